"""The one table that joins the released tensor names to our parameter tree.

A rule is target path ← released name ← layout. ``{l}`` stands for a layer number, ``{e}`` for an
expert, whose tensors are stacked along a new first axis of the target; ``{2l}`` is twice the layer
number. A layout is a permutation of the released tensor's axes followed by a reshape, so every rule
can be read in both directions: conversion and export use the same table.

`expand` derives from the parameter tree of a configuration which rules apply and how often, and
`check` compares the result with the tensors that a checkpoint really has, both ways.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import LeafPath, path_name, stays_float32

Shape = tuple[int, ...]

# The dtypes that a checkpoint's tensors may have: safetensors name → numpy name.
FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The tensors of the pooling head. Tools that save what the language model computes with leave out all of them.
UNUSED = "vision.attn_pool."
UNUSED_PATH = ("vision", "attn_pool")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one released tensor lies in its target.

    ``source_shape`` is the released shape; permuting its axes by ``axes`` and reshaping gives the
    target. The identity permutation moves no element. ``inputs`` are the axes of the target that the
    released matrix [out, in] has as its inputs; empty where it is no such matrix.
    """

    source_shape: Shape
    axes: tuple[int, ...]
    inputs: tuple[int, ...] = ()

    def view(self, target: np.ndarray) -> np.ndarray:
        """``target`` (contiguous) seen with the released shape: a view, so writing to it fills the target."""
        permuted = target.reshape([self.source_shape[a] for a in self.axes])
        return permuted.transpose(np.argsort(self.axes))

    def block(self, target: Shape, window: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """The block of the released tensor that fills ``window`` of a target; None when that is not one block.

        Args:
          target: shape of the target. window: a slice with start and stop for each of its axes.
        """
        blocks, axis = [slice(0, size) for size in self.source_shape], 0
        for number in self.axes:
            size, group = self.source_shape[number], []  # the axes of the target that this one is split into
            while axis < len(target) and math.prod(target[a] for a in group) < size:
                group.append(axis)
                axis += 1
            if math.prod(target[a] for a in group) != size:
                return None
            cut = [a for a in group if window[a] != slice(0, target[a])]
            if cut:
                outer = next(a for a in group if target[a] > 1)
                if cut != [outer]:
                    return None
                inner = size // target[outer]
                blocks[number] = slice(window[outer].start * inner, window[outer].stop * inner)
        return tuple(blocks)

    @property
    def is_identity(self) -> bool:
        return self.axes == tuple(range(len(self.axes)))


LayoutOf = Callable[[Shape], Layout]  # target shape, without the expert axis → layout


def _identity(source_shape: Shape) -> Layout:
    return Layout(source_shape, tuple(range(len(source_shape))))


def same(target: Shape) -> Layout:
    """Released as it is here."""
    return _identity(target)


def flat(target: Shape) -> Layout:
    """A released vector, split into axes here: the biases of attention heads."""
    return _identity((math.prod(target),))


def rows(target: Shape) -> Layout:
    """A released matrix [rows, columns] whose rows are split into axes here."""
    return Layout((math.prod(target[:-1]), target[-1]), (0, 1), inputs=(len(target) - 1,))


def leading_ones(count: int) -> LayoutOf:
    """Released with ``count`` leading axes of size 1."""
    return lambda target: _identity((1,) * count + target)


def linear(inputs: int = 1) -> LayoutOf:
    """torch Linear [out, in] → kernel [in …, out …], whose first ``inputs`` axes are the input."""

    def layout(target: Shape) -> Layout:
        return Layout((math.prod(target[inputs:]), math.prod(target[:inputs])), (1, 0), tuple(range(inputs)))

    return layout


def patch_conv(target: Shape) -> Layout:
    """torch Conv2d [W, 3, P, P] over patches → kernel [(dy, dx, channel), W]."""
    side = math.isqrt(target[0] // 3)
    return Layout((target[1], 3, side, side), (2, 3, 1, 0))


@dataclasses.dataclass(frozen=True)
class Rule:
    """``target`` path ← ``source`` name, both with placeholders."""

    target: str
    source: str
    layout: LayoutOf

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.target).replace(r"\{l\}", r"(?P<l>\d+)"))

    def sources(self, layer: int | None, experts: int) -> list[str]:
        """The released names for one target; ``experts`` of them when the rule stacks."""
        name = self.source
        if layer is not None:
            name = name.replace("{l}", str(layer)).replace("{2l}", str(2 * layer))
        return [name.replace("{e}", str(e)) for e in range(experts)] if self.stacks else [name]

    @property
    def stacks(self) -> bool:
        return "{e}" in self.source


def _mlp(target: str, source: str) -> list[Rule]:
    return [
        Rule(f"{target}/{name}/kernel", f"{source}.{name}.weight", linear())
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


def _norm(target: str, source: str) -> list[Rule]:
    return [Rule(f"{target}/scale", f"{source}.weight", same), Rule(f"{target}/bias", f"{source}.bias", same)]


_BLOCK, _VISION = "vision/blocks_{l}", "vision.blocks.{l}"
_LAYER, _MODEL = "language/layers_{l}", "language.model.layers.{l}"
_ATTENTION, _TORCH_ATTENTION = f"{_LAYER}/self_attn", f"{_MODEL}.self_attn"

# Projections whose input is the first axis; o_proj contracts two axes, kv_b_proj is kept as released.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
_POOLED = (("q", "q"), ("kv", "kv"), ("proj", "proj"), ("mlp_fc1", "mlp.fc1"), ("mlp_fc2", "mlp.fc2"))

RULES: tuple[Rule, ...] = (
    Rule("image_newline", "image_newline", same),
    Rule("view_seperator", "view_seperator", same),
    # Vision encoder
    Rule("vision/pos_embed", "vision.pos_embed", leading_ones(1)),
    Rule("vision/patch_embed/kernel", "vision.patch_embed.proj.weight", patch_conv),
    Rule("vision/patch_embed/bias", "vision.patch_embed.proj.bias", same),
    *_norm(f"{_BLOCK}/norm1", f"{_VISION}.norm1"),
    Rule(f"{_BLOCK}/attn/qkv/kernel", f"{_VISION}.attn.qkv.weight", linear()),
    Rule(f"{_BLOCK}/attn/qkv/bias", f"{_VISION}.attn.qkv.bias", flat),
    Rule(f"{_BLOCK}/attn/proj/kernel", f"{_VISION}.attn.proj.weight", linear(2)),
    Rule(f"{_BLOCK}/attn/proj/bias", f"{_VISION}.attn.proj.bias", same),
    *_norm(f"{_BLOCK}/norm2", f"{_VISION}.norm2"),
    *(Rule(f"{_BLOCK}/mlp/{fc}/kernel", f"{_VISION}.mlp.{fc}.weight", linear()) for fc in ("fc1", "fc2")),
    *(Rule(f"{_BLOCK}/mlp/{fc}/bias", f"{_VISION}.mlp.{fc}.bias", same) for fc in ("fc1", "fc2")),
    *_norm("vision/norm", "vision.norm"),
    # The pooling head: in every checkpoint, computed by contrastive training alone
    Rule("vision/attn_pool/latent", "vision.attn_pool.latent", leading_ones(2)),
    *(Rule(f"vision/attn_pool/{name}_kernel", f"vision.attn_pool.{t}.weight", linear()) for name, t in _POOLED),
    *(Rule(f"vision/attn_pool/{name}_bias", f"vision.attn_pool.{t}.bias", same) for name, t in _POOLED),
    Rule("vision/attn_pool/norm_scale", "vision.attn_pool.norm.weight", same),
    Rule("vision/attn_pool/norm_bias", "vision.attn_pool.norm.bias", same),
    # Adaptor: the released Sequential counts its activations as layers
    Rule("projector/layers_{l}/kernel", "projector.layers.{2l}.weight", linear()),
    Rule("projector/layers_{l}/bias", "projector.layers.{2l}.bias", same),
    # Decoder
    Rule("language/embed_tokens", "language.model.embed_tokens.weight", same),
    Rule("language/norm/scale", "language.model.norm.weight", same),
    Rule("language/lm_head/kernel", "language.lm_head.weight", linear()),
    Rule(f"{_LAYER}/input_layernorm/scale", f"{_MODEL}.input_layernorm.weight", same),
    Rule(f"{_LAYER}/post_attention_layernorm/scale", f"{_MODEL}.post_attention_layernorm.weight", same),
    *(Rule(f"{_ATTENTION}/{p}/kernel", f"{_TORCH_ATTENTION}.{p}.weight", linear()) for p in _PROJECTIONS),
    *(Rule(f"{_ATTENTION}/{p}/bias", f"{_TORCH_ATTENTION}.{p}.bias", flat) for p in _PROJECTIONS),
    Rule(f"{_ATTENTION}/q_a_layernorm/scale", f"{_TORCH_ATTENTION}.q_a_layernorm.weight", same),
    Rule(f"{_ATTENTION}/kv_a_layernorm/scale", f"{_TORCH_ATTENTION}.kv_a_layernorm.weight", same),
    Rule(f"{_ATTENTION}/kv_b_proj", f"{_TORCH_ATTENTION}.kv_b_proj.weight", rows),
    Rule(f"{_ATTENTION}/o_proj/kernel", f"{_TORCH_ATTENTION}.o_proj.weight", linear(2)),
    Rule(f"{_ATTENTION}/o_proj/bias", f"{_TORCH_ATTENTION}.o_proj.bias", same),
    *_mlp(f"{_LAYER}/mlp", f"{_MODEL}.mlp"),
    *_mlp(f"{_LAYER}/mlp/shared_experts", f"{_MODEL}.mlp.shared_experts"),
    *(
        Rule(f"{_LAYER}/mlp/experts/{name}", f"{_MODEL}.mlp.experts.{{e}}.{name}.weight", linear())
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    Rule(f"{_LAYER}/mlp/router/kernel", f"{_MODEL}.mlp.gate.weight", linear()),
    Rule(f"{_LAYER}/mlp/router/correction_bias", f"{_MODEL}.mlp.gate.e_score_correction_bias", same),
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and the released tensors that fill it.

    ``shape`` is the parameter's. ``layout`` is that of one tensor; with ``stacked``, tensor ``i`` of
    ``sources`` fills ``parameter[i]``, else the only one fills the parameter.
    """

    path: LeafPath
    shape: Shape
    sources: tuple[str, ...]
    layout: Layout
    stacked: bool

    @property
    def name(self) -> str:
        return path_name(self.path)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The parameter's axes that hold the inputs of released matrices [out, in]; empty where they are no such."""
        return tuple(int(self.stacked) + axis for axis in self.layout.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The parameter's other axes, but for that of experts."""
        return tuple(axis for axis in range(int(self.stacked), len(self.shape)) if axis not in self.inputs)

    def parts(self, parameter: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(released name, its part of the parameter viewed with the released shape), writable."""
        if not self.stacked:
            return [(self.sources[0], self.layout.view(parameter))]
        return [(name, self.layout.view(parameter[i])) for i, name in enumerate(self.sources)]

    def block(
        self, window: tuple[slice, ...], out: np.ndarray
    ) -> tuple[tuple[slice, ...], list[tuple[str, np.ndarray]]] | None:
        """As `parts`, for ``out``, the slice ``window`` of the parameter: each view is one block of its tensor.

        Returns:
          The block, and (released name, view) for each tensor; None when the slice is not made of blocks.
        """
        inner = window[1:] if self.stacked else window
        block = self.layout.block(self.shape[1:] if self.stacked else self.shape, inner)
        if block is None:
            return None
        layout = Layout(tuple(part.stop - part.start for part in block), self.layout.axes)
        if not self.stacked:
            return block, [(self.sources[0], layout.view(out))]
        return block, [(name, layout.view(out[i])) for i, name in enumerate(self.sources[window[0]])]


@functools.lru_cache(maxsize=8)
def expand(config: Config) -> tuple[Leaf, ...]:
    """Every parameter of the configuration with its released tensors, in the tree's order.

    Raises:
      ValueError: the tree has a parameter that no rule, or more than one, fills; or two parameters
        would take the same tensor. That is a mistake in `RULES`, not in a checkpoint.
    """
    from dsvl2_jax.model.deepseek_vl2 import abstract_leaves  # jax, which finding a checkpoint does without

    leaves = [_leaf(path, shape) for path, (shape, _) in abstract_leaves(config).items()]
    taken_by: dict[str, str] = {}
    for leaf in leaves:
        for source in leaf.sources:
            if source in taken_by:
                raise ValueError(f"rules: {taken_by[source]} and {leaf.name} both take tensor {source}")
            taken_by[source] = leaf.name
    return tuple(leaves)


def linear_leaves(config: Config) -> dict[LeafPath, Leaf]:
    """The parameters that are matrices of linear layers, with heads and experts: those that can have an adapter.

    Not the router's, which computes in float32 always, nor the pooling head's, of which the language model has no use.
    """
    return {
        leaf.path: leaf
        for leaf in expand(config)
        if leaf.layout.inputs and not stays_float32(leaf.path) and leaf.path[: len(UNUSED_PATH)] != UNUSED_PATH
    }


def _leaf(path: LeafPath, shape: Shape) -> Leaf:
    name = path_name(path)
    matches = [(rule, match) for rule in RULES if (match := rule.pattern.fullmatch(name))]
    if len(matches) != 1:
        raise ValueError(f"rules: {len(matches)} rules fill parameter {name}, expected exactly one")
    rule, match = matches[0]
    layer = int(match["l"]) if "l" in match.groupdict() else None
    sources = rule.sources(layer, shape[0])
    return Leaf(path, shape, tuple(sources), rule.layout(shape[1:] if rule.stacks else shape), rule.stacks)


def expected_shapes(config: Config) -> dict[str, Shape]:
    """Released tensor name → shape, for every tensor of a checkpoint of this configuration."""
    return {source: leaf.layout.source_shape for leaf in expand(config) for source in leaf.sources}


def lacks_unused(names: Iterable[str]) -> bool:
    """True for a checkpoint without any tensor of the unused part."""
    return not any(name.startswith(UNUSED) for name in names)


def compare(stored: Mapping[str, tuple[Shape, str]], config: Config) -> dict[str, list[str]]:
    """Kind of problem → the tensors that have it; empty when the checkpoint fits the configuration.

    Args:
      stored: tensor name → (shape, safetensors dtype name).
    """
    expected = expected_shapes(config)
    if lacks_unused(stored):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(UNUSED)}
    problems = {
        "missing tensors": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored],
        "unknown tensors": [f"{name} {list(stored[name][0])}" for name in stored if name not in expected],
        "tensors of a wrong shape": [
            f"{name}: found {list(stored[name][0])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in stored and stored[name][0] != shape
        ],
        "tensors that are not floating point (F32, F16, BF16)": [
            f"{name}: {dtype}" for name, (_, dtype) in stored.items() if name in expected and dtype not in FLOAT_DTYPES
        ],
    }
    return {kind: tensors for kind, tensors in problems.items() if tensors}


def check(stored: Mapping[str, tuple[Shape, str]], config: Config, source: str) -> None:
    """Raises CheckpointError with every problem of `compare` in one message, unless there is none."""
    problems = compare(stored, config)
    if problems:
        text = "\n".join(f"  {len(tensors)} {kind}:\n{listed(tensors)}" for kind, tensors in problems.items())
        raise CheckpointError(
            f"{source}: the tensors do not fit the model that its config.json describes:\n{text}\n"
            "Check that config.json and the weights come from the same release, and download what is missing."
        )
