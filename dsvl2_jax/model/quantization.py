"""Which weights are kept in 8 or 4 bits, and how the parameters then lie: shapes, dtypes, shardings.

Only weights that enter a product as `dsvl2_jax.model.layers.declare` describes can be quantized: experts, attention,
dense and shared MLPs, adaptor, encoder and output head. Router, norms, embeddings, biases and the unused pooling head
are plain arrays always.

Tested in tests/model/test_quantization.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsvl2_jax.errors import UsageError
from dsvl2_jax.kernels.quantized import GROUP, KINDS, Quantized, group_size, quantize
from dsvl2_jax.messages import did_you_mean
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, abstract_leaves, weight_inputs
from dsvl2_jax.model.parameter_paths import LeafPath, path_name, stays_float32
from dsvl2_jax.sharding import PARAM_RULES, add_fsdp_axis, partition_spec

WHOLE = "keep"  # what a rule says of weights that stay as they are

# Which weights are kept otherwise than most, as (regular expression of the path, kind or `WHOLE`); the first that is
# found in a path decides. The output head decides between tokens, and the patch embedding sees pixels first. In int4
# are the experts, which are nearly all of a model: what the others would save costs more than it gives
# (docs/quantization.md has the figures).
_ALWAYS = (("language/lm_head|vision/patch_embed", WHOLE),)
RULES = {
    "int8": _ALWAYS,
    "int4": (*_ALWAYS, (r"vision/|projector/|self_attn|layers_\d+/mlp/(gate|up|down)_proj", "int8")),
    "float8": _ALWAYS,
}

Shape = tuple[int, ...]
Shapes = Mapping[LeafPath, Shape]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What is done to a checkpoint.

    Attributes:
      kind: of `KINDS`, of weights that no rule names.
      rules: as `RULES`, which are meant without them.
    """

    kind: str
    rules: tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an unknown kind or a wrong expression."""
        if self.kind not in KINDS:
            raise UsageError(
                f"--quantize {self.kind}: expected one of {', '.join(KINDS)}{did_you_mean(self.kind, KINDS)}"
            )
        if self.rules is None:
            object.__setattr__(self, "rules", RULES[self.kind])
        for pattern, kind in self.rules:
            if kind not in (*KINDS, WHOLE):
                raise UsageError(f"--rule {pattern}={kind}: expected one of {', '.join(KINDS)} or {WHOLE} after the =.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--rule {pattern}={kind}: no regular expression ({error}).") from None

    def described(self) -> dict[str, Any]:
        """What the manifest of a quantized checkpoint says of it."""
        return {"kind": self.kind, "group": GROUP, "rules": ["=".join(rule) for rule in self.rules]}

    @staticmethod
    def of(described: Mapping[str, Any]) -> Quantization:
        """What `described` said."""
        return Quantization(described["kind"], tuple(_rule(text) for text in described["rules"]))


def _rule(text: str) -> tuple[str, str]:
    pattern, _, kind = text.rpartition("=")
    return pattern, kind


def quantization_of(kind: str | None, rules: Sequence[str] = ()) -> Quantization | None:
    """What the options ``--quantize KIND`` and ``--rule REGEX=KIND`` say; these rules go before `RULES`.

    Raises UsageError for a wrong value, or the second option alone.
    """
    if kind is None:
        if rules:
            raise UsageError(f"--rule {rules[0]}: says how --quantize keeps some weights; give both, or neither.")
        return None
    return Quantization(kind, (*map(_rule, rules), *RULES.get(kind, ())))


def quantized_weights(config: Config, quantization: Quantization | None) -> dict[LeafPath, str]:
    """Path → kind, of every weight that is quantized: int4 becomes int8 where no group divides the inputs.

    Raises:
      UsageError: a rule decides about no weight, or none is quantized.
    """
    if quantization is None:
        return {}
    inputs, leaves = weight_inputs(config), abstract_leaves(config)
    found, used = {}, set()
    for path in inputs:
        rule = next((rule for rule in quantization.rules if re.search(rule[0], path_name(path))), None)
        used.add(rule)
        kind = quantization.kind if rule is None else rule[1]
        if kind == "int4" and group_size(leaves[path][0][inputs[path][-1]]) is None:
            kind = "int8"
        if kind != WHOLE:
            found[path] = kind
    unused = [rule for rule in quantization.rules if rule not in used and rule not in RULES[quantization.kind]]
    if unused or not found:
        some = ", ".join(path_name(path) for path in list(inputs)[-3:])
        problem = f"{'='.join(unused[0])}: decides about no weight" if unused else "leaves no weight to be quantized"
        raise UsageError(f"--rule {problem}. Paths of weights are such as {some}; the first rule found in one decides.")
    return found


@functools.lru_cache(maxsize=256)
def quantized_shapes(shape: Shape, kind: str, inputs: tuple[int, ...]) -> dict[str, tuple[Shape, np.dtype]]:
    """What `quantize` makes of a weight of this shape."""
    stored = jax.eval_shape(lambda w: quantize(w, kind, inputs), jax.ShapeDtypeStruct(shape, jnp.float32))
    return {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in stored.items()}


def leaves_of(config: Config, kinds: Mapping[LeafPath, str]) -> dict[LeafPath, tuple[Shape, np.dtype | None]]:
    """Path → (shape, dtype) of every array of the parameters; no dtype of those that are not quantized.

    Args:
      kinds: path → kind, of the weights that are quantized.
    """
    inputs = weight_inputs(config)
    leaves: dict[LeafPath, tuple[Shape, np.dtype | None]] = {}
    for path, (shape, _) in abstract_leaves(config).items():
        if path in kinds:
            parts = quantized_shapes(shape, kinds[path], inputs[path])
            leaves |= {(*path, name): entry for name, entry in parts.items()}
        else:
            leaves[path] = shape, None
    return leaves


def bytes_in_bfloat16(config: Config, kinds: Mapping[LeafPath, str]) -> int:
    """Memory of the parameters where all that is not quantized is in bfloat16, the router's in float32."""
    return sum(
        math.prod(shape) * (dtype.itemsize if dtype is not None else 4 if stays_float32(path) else 2)
        for path, (shape, dtype) in leaves_of(config, kinds).items()
    )


def kinds_of(paths: Mapping[LeafPath, Any]) -> dict[LeafPath, str]:
    """Path → kind, of every quantized weight among arrays of these paths."""
    return {path[:-1]: path[-1] for path in paths if path[-1] in KINDS and (*path[:-1], "scale") in paths}


def mismatches(config: Config, stored: Mapping[LeafPath, tuple[Shape, np.dtype]]) -> list[str]:
    """How arrays differ from those of the configuration's parameters, quantized or not; empty when they do not."""
    inputs, leaves = weight_inputs(config), abstract_leaves(config)
    kinds = {
        path: kind
        for path, kind in kinds_of(stored).items()
        if path in inputs and (kind != "int4" or group_size(leaves[path][0][inputs[path][-1]]) is not None)
    }
    expected = leaves_of(config, kinds)
    problems = [f"missing: {path_name(path)}" for path in expected if path not in stored]
    problems += [f"unexpected: {path_name(path)}" for path in stored if path not in expected]
    for path, (shape, dtype) in expected.items():
        if path not in stored:
            continue
        if stored[path][0] != shape:
            problems.append(f"{path_name(path)}: found {list(stored[path][0])}, expected {list(shape)}")
        elif dtype is not None and stored[path][1] != dtype:
            problems.append(f"{path_name(path)}: found {stored[path][1].name}, expected {dtype.name}")
    return problems


def weight_specs(
    weight: Quantized, last_input: int, spec_of: Callable[[Shape], PartitionSpec]
) -> tuple[PartitionSpec, PartitionSpec]:
    """How values and scale of a quantized weight are split: a device's scales are those of its values.

    An axis with groups is split between them, where their number divides, and never within one.

    Args:
      weight: of arrays, or of anything that has their shapes.
      last_input: the axis along which groups lie, from the start.
      spec_of: from a shape to how a plain weight of that shape is split.
    """
    counted, scale = list(weight.shape), weight.scale.shape
    if weight.kind == "int4" or scale[last_input] > 1:
        counted[last_input] = scale[last_input]
    values = spec_of(tuple(counted))
    entries = (*values, *(None,) * (len(scale) - len(values)))
    return values, PartitionSpec(*(None if size == 1 else entry for size, entry in zip(scale, entries, strict=True)))


def stored_shardings(
    config: Config, mesh: Mesh, shapes: Shapes, *, fsdp: bool = False
) -> dict[LeafPath, NamedSharding]:
    """A NamedSharding for every array of parameters, see `stored_specs`."""
    specs = stored_specs(config, dict(mesh.shape), shapes, fsdp=fsdp)
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def stored_specs(
    config: Config, sizes: Mapping[str, int], shapes: Shapes, *, fsdp: bool = False
) -> dict[LeafPath, PartitionSpec]:
    """How every array of parameters is split, quantized or not, by `PARAM_RULES`.

    Args:
      sizes: of the mesh's axes.
      shapes: path → shape of every array.
      fsdp: split large ones by `add_fsdp_axis` too.
    """
    leaves, inputs, kinds = abstract_leaves(config), weight_inputs(config), kinds_of(shapes)

    def spec(axes: tuple[str | None, ...], shape: Shape) -> PartitionSpec:
        spec = partition_spec(shape, axes, sizes, PARAM_RULES)
        return add_fsdp_axis(spec, shape, sizes) if fsdp else spec

    found: dict[LeafPath, PartitionSpec] = {}
    for path, (shape, axes) in leaves.items():
        spec_of = functools.partial(spec, axes)
        if path not in kinds:
            found[path] = spec_of(shape)
            continue
        kind, last = kinds[path], inputs[path][-1]
        parts = {name: jax.ShapeDtypeStruct(shapes[(*path, name)], jnp.float32) for name in (kind, "scale")}
        weight = Quantized(parts[kind], parts["scale"], kind, last - len(shape))
        found[(*path, kind)], found[(*path, "scale")] = weight_specs(weight, last, spec_of)
    return {path: found[path] for path in shapes}


def quantize_params(params: Params, config: Config, quantization: Quantization) -> Params:
    """Parameters with the weights of a whole model rounded; those of plain ones are let go of one by one.

    Args:
      params: nested, all plain; arrays are taken out of it.
      config: of the model.
      quantization: which weights, and how.
    """
    kinds, inputs = quantized_weights(config, quantization), weight_inputs(config)
    for path, kind in kinds.items():
        *modules, name = path
        module = functools.reduce(lambda tree, key: tree[key], modules, params)
        module[name] = quantize_array(module.pop(name), kind, inputs[path])
    return params


quantize_array = jax.jit(quantize, static_argnames=("kind", "inputs"))
