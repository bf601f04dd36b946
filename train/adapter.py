"""Adapters in training (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353): which weights have one, how it begins, and how
it joins the frozen base inside the loss.

An adapted weight is a dict in the weight's place (`dsvl2_jax.model.weights`). In the trained state ``lora_b`` is
without the adapter's factor, as files hold it; `joined` multiplies it in.

Tested in tests/train/test_adapter.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.weights import is_stored_weight, merged, weight_of
from dsvl2_jax.train.settings.schema import AdapterStage

# What is trained of an adapted weight.
LEAVES = ("lora_a", "lora_b", "magnitude")

# Matrices without an adapter: the router's choice is no product of the model's dtype, the head's loss is made in chunks
# of its own, and nothing computes the pooling head.
_WITHOUT = re.compile(r"/router/|^language/lm_head/|^vision/(attn_pool|patch_embed)/")

_NO_AXES = ("dropout_key", "dropout_rate")

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight's shape and logical axes, taken apart as a product takes them."""

    lead: Shape  # of experts, or nothing
    inputs: Shape
    outputs: Shape
    lead_axes: Axes
    input_axes: Axes
    output_axes: Axes
    input_last: bool  # the outputs lie before the one input, as released: kv_b_proj

    @property
    def packed_axis(self) -> int:
        """The last input axis, from the end."""
        return -1 if self.input_last else -1 - len(self.outputs)

    def leaf(self, name: str, rank: int) -> tuple[Shape, Axes]:
        """Shape and logical axes of one of `LEAVES`."""
        if name == "lora_a":
            return (*self.lead, *self.inputs, rank), (*self.lead_axes, *self.input_axes, None)
        if name == "lora_b":
            return (*self.lead, rank, *self.outputs), (*self.lead_axes, None, *self.output_axes)
        return (*self.lead, *self.outputs), (*self.lead_axes, *self.output_axes)


@functools.lru_cache(maxsize=8)
def matrices(config: Config) -> dict[LeafPath, Matrix]:
    """The weights that may have an adapter, by their paths, layers apart."""
    found = {}
    for leaf in rules.expand(config):
        shape, axes = abstract_leaves(config)[leaf.path]
        lead = int(leaf.stacked)
        out_in = leaf.layout.source_shape
        if len(out_in) != 2 or len(shape) - lead < 2 or _WITHOUT.search(leaf.name):
            continue
        if leaf.layout.is_identity:
            if len(shape) - lead == 2:  # a table, such as the embeddings
                continue
            split = (shape[-1:], shape[lead:-1]), (axes[-1:], axes[lead:-1])
        else:
            count = next(n for n in range(1, len(shape)) if math.prod(shape[lead : lead + n]) == out_in[1])
            split = tuple((x[lead : lead + count], x[lead + count :]) for x in (shape, axes))
        (inputs, outputs), (input_axes, output_axes) = split
        found[leaf.path] = Matrix(
            shape[:lead], inputs, outputs, axes[:lead], input_axes, output_axes, leaf.layout.is_identity
        )
    return found


def targeted(config: Config, targets: Iterable[str]) -> list[LeafPath]:
    """The weights that the regular expressions ask adapters for, in the order of the tree.

    Raises:
      SettingsError: one of them matches no weight that can have an adapter.
    """
    patterns = [(text, re.compile(text)) for text in targets]
    able = matrices(config)
    for text, pattern in patterns:
        if any(pattern.search(path_name(path)) for path in able):
            continue
        others = [name for path in abstract_leaves(config) if pattern.search(name := path_name(path))]
        why = f"only parameters that are no matrix with an adapter's place:\n{listed(others, 10)}"
        kinds = dict.fromkeys(re.sub(r"(layers|blocks)_\d+", r"\1_0", path_name(path)) for path in able)
        raise SettingsError(
            f"adapter.targets: '{text}' matches {why if others else 'no parameter of this model.'}\n"
            f"Weights that can have an adapter are, of the first layers:\n{listed(list(kinds), 40)}"
        )
    return [path for path in able if any(pattern.search(path_name(path)) for _, pattern in patterns)]


def adapter_leaves(config: Config, stage: AdapterStage) -> dict[LeafPath, tuple[Shape, Axes]]:
    """Path → (shape, logical axes) of everything that a stage trains, layers apart.

    Raises:
      SettingsError: a target matches nothing.
    """
    names = LEAVES if stage.kind == "dora" else LEAVES[:2]
    able = matrices(config)
    return {
        (*path, name): able[path].leaf(name, stage.rank) for path in targeted(config, stage.targets) for name in names
    }


def base_leaves(
    config: Config, stage: AdapterStage, stored: Mapping[LeafPath, Shape] | None = None
) -> dict[LeafPath, tuple[Shape, Axes]]:
    """Path → (shape, logical axes) of the frozen parameters, where they lie among the adapters'; layers apart.

    Args:
      stored: the shapes of the checkpoint's leaves, where some are quantized; None: all are plain.
    """
    leaves = abstract_leaves(config)
    adapted = set(targeted(config, stage.targets))
    found = {}
    for path, shape in (stored or {path: shape for path, (shape, _) in leaves.items()}).items():
        weight = path if path in leaves else path[:-1]  # without int8, int4, float8 or scale
        place = (*weight, "base", *path[len(weight) :]) if weight in adapted else path
        found[place] = shape, leaves[weight][1]
    return found


def stored_axes(config: Config, path: LeafPath) -> Axes | None:
    """The logical axes of a leaf of the parameters, which may be part of a quantized or adapted weight, layers apart.

    None: of a leaf that is no part of the model, such as a random key.
    """
    leaves, end = abstract_leaves(config), len(path)
    while path[:end] not in leaves:
        end -= 1
    if end == len(path) or path[-1] not in (*LEAVES, *_NO_AXES):
        return leaves[path[:end]][1]
    return None if path[-1] in _NO_AXES else matrices(config)[path[:end]].leaf(path[-1], 0)[1]


def with_adapter(params: Params, adapter: Params) -> Params:
    """The parameters of a checkpoint with an adapter's in their places; ``params`` is taken apart, nothing copied."""
    for path, leaf in flatten_dict(adapter).items():
        parent = params
        for key in path[:-2]:
            parent = parent[key]
        weight = parent[path[-2]]
        if not (isinstance(weight, Mapping) and "base" in weight):
            weight = parent[path[-2]] = {"base": weight}
        weight[path[-1]] = leaf
    return params


def init_adapter(params: Params, config: Config, stage: AdapterStage, seed: int) -> Params:
    """A fresh adapter, f32, as `peft` begins: A uniform within 1/√inputs, B zero, magnitudes the norms of the base.

    What a weight's A is depends on the seed and the weight's path alone.

    Args:
      params: of the base, nested, layers apart.
    """
    adapter: dict[LeafPath, Any] = {}
    for path in targeted(config, stage.targets):
        matrix = matrices(config)[path]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path_name(path).encode()))
        bound = math.prod(matrix.inputs) ** -0.5
        shape = matrix.leaf("lora_a", stage.rank)[0]
        # On the host, where every process has all of it.
        adapter[(*path, "lora_a")] = np.asarray(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        adapter[(*path, "lora_b")] = np.zeros(matrix.leaf("lora_b", stage.rank)[0], np.float32)
        if stage.kind == "dora":
            base = functools.reduce(lambda tree, name: tree[name], path, params)
            adapter[(*path, "magnitude")] = _column_norms(base, matrix)
    return unflatten_dict(adapter)


def _column_norms(base: Any, matrix: Matrix) -> jax.Array:
    @jax.jit
    def norms(base: Any) -> jax.Array:
        whole = merged(weight_of(base, matrix.packed_axis), matrix.packed_axis)
        last = matrix.packed_axis % whole.ndim
        return jnp.sqrt(jnp.square(whole).sum(tuple(range(last + 1 - len(matrix.inputs), last + 1))))

    return norms(base)


def factor(stage: AdapterStage) -> float:
    """What lora_a · lora_b is multiplied with: alpha / rank, with ``rslora`` alpha / √rank (arXiv 2312.03732)."""
    return stage.alpha / (math.sqrt(stage.rank) if stage.rslora else stage.rank)


def joined(params: Params, stage: AdapterStage, key: jax.Array | None = None) -> Params:
    """Parameters as the model's products take them: with the factor inside ``lora_b``, and with dropout.

    Args:
      params: nested, layers apart or stacked; of an adapter as it is trained.
      key: random key of the step; None: without dropout.
    """
    dropout = stage.dropout if key is not None else 0.0

    def join(path: LeafPath, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if not (is_stored_weight(value) and "lora_a" in value):
            return {name: join((*path, name), inner) for name, inner in value.items()}
        value = {**value, "lora_b": value["lora_b"] * factor(stage)}
        if dropout:
            own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            # Stacked layers have one key each.
            layers = value["lora_a"].shape[:1] if "_to_" in path_name(path[:2]) else ()
            value["dropout_key"] = jax.random.key_data(jax.random.split(own, layers) if layers else own)
            value["dropout_rate"] = jnp.full(layers, dropout, jnp.float32)
        return value

    return join((), params)
