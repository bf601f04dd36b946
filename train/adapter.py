"""Adapters in training (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353): which weights have one, how it begins, and how
it joins the frozen base inside the loss.

An adapted weight is a dict in the weight's place (`dsvl2_jax.model.weights`). In the trained state ``lora_b`` is
without the adapter's factor, as files hold it; `joined` multiplies it in.

Tested in tests/train/objectives/test_adapter.py.
"""

from __future__ import annotations

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
from dsvl2_jax.checkpoint.adapter_tensors import scale_factor
from dsvl2_jax.checkpoint.adapters import array_shapes
from dsvl2_jax.checkpoint.apply_adapter import array_axes
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.weights import is_stored_weight, merged, weight_of
from dsvl2_jax.train.settings.schema import AdapterStage

# What is trained of an adapted weight.
LEAVES = ("lora_a", "lora_b", "magnitude")

_NO_AXES = ("dropout_key", "dropout_rate")

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]


@functools.lru_cache(maxsize=8)
def adaptable(config: Config) -> dict[LeafPath, rules.Leaf]:
    """The weights that may have an adapter in training, by their paths, layers apart.

    Not the output head: its loss is made in chunks of its own.
    """
    return {path: leaf for path, leaf in rules.linear_leaves(config).items() if path[:2] != ("language", "lm_head")}


def targeted(config: Config, targets: Iterable[str]) -> list[LeafPath]:
    """The weights that the regular expressions ask adapters for, in the order of the tree.

    Raises:
      SettingsError: one of them matches no weight that can have an adapter.
    """
    patterns = [(text, re.compile(text)) for text in targets]
    able = adaptable(config)
    for text, pattern in patterns:
        if any(pattern.search(path_name(path)) for path in able):
            continue
        others = [name for path in abstract_leaves(config) if pattern.search(name := path_name(path))]
        why = f"nothing that can have an adapter, only:\n{listed(others, 10)}"
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
    found = {}
    for path in targeted(config, stage.targets):
        leaf = adaptable(config)[path]
        shapes, axes = array_shapes(leaf, stage.rank), array_axes(config, leaf)
        found |= {(*path, name): (shapes[name], axes[name]) for name in names}
    return found


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
    return None if path[-1] in _NO_AXES else array_axes(config, adaptable(config)[path[:end]])[path[-1]]


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
        leaf = adaptable(config)[path]
        shapes = array_shapes(leaf, stage.rank)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(leaf.name.encode()))
        bound = math.prod(leaf.shape[axis] for axis in leaf.inputs) ** -0.5
        # On the host, where every process has all of it.
        adapter[(*path, "lora_a")] = np.asarray(jax.random.uniform(key, shapes["lora_a"], jnp.float32, -bound, bound))
        adapter[(*path, "lora_b")] = np.zeros(shapes["lora_b"], np.float32)
        if stage.kind == "dora":
            base = functools.reduce(lambda tree, name: tree[name], path, params)
            adapter[(*path, "magnitude")] = _output_norms(base, leaf.inputs)
    return unflatten_dict(adapter)


@functools.partial(jax.jit, static_argnums=1)
def _output_norms(base: Any, inputs: tuple[int, ...]) -> jax.Array:
    """f32[*lead, *outputs], the norm of each output's weights."""
    ndim = jax.tree.leaves(base)[0].ndim
    whole = merged(weight_of(base, inputs[-1] - ndim), inputs[-1] - ndim)
    return jnp.sqrt(jnp.square(whole).sum(inputs))


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
        value = {**value, "lora_b": value["lora_b"] * scale_factor(stage.alpha, stage.rank, stage.rslora)}
        if dropout:
            own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            # Stacked layers have one key each.
            layers = value["lora_a"].shape[:1] if "_to_" in path_name(path[:2]) else ()
            value["dropout_key"] = jax.random.key_data(jax.random.split(own, layers) if layers else own)
            value["dropout_rate"] = jnp.full(layers, dropout, jnp.float32)
        return value

    return join((), params)
