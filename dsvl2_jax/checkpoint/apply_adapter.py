"""Adapters put into a model's parameters for inference, and the digest that tells which base one was trained on.

Tested in tests/checkpoint/test_apply_adapter.py.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.adapters import Adapter, AdapterSettings
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, abstract_leaves, compute_dtype
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.weights import is_stored_weight, merged, weight_of
from dsvl2_jax.sharding import PARAM_RULES, partition_spec

_MERGED_AT_ONCE = 1 << 24  # numbers of a matrix, which are in float32 meanwhile
_SAMPLE = 8  # numbers of each matrix that its base's digest is made of


def with_adapter(
    params: Params,
    config: Config,
    adapter: Adapter,
    settings: AdapterSettings,
    mesh: Mesh | None = None,
    source: str | Path = "adapter",
) -> Params:
    """A model's parameters with an adapter, as inference takes them.

    Args:
      params: of the whole model, nested; they are not copied. Weights are plain or quantized.
      config: of the model.
      adapter, settings: of `dsvl2_jax.checkpoint.adapters.read_adapter`.
      mesh: on which the parameters lie; None: on one device.
      source: what the adapter is called in messages.

    Returns:
      Nested dict in which each weight with an adapter is {"base", "lora_a", "lora_b" (times the adapter's factor)}, of
      DoRA with "gain"; see `dsvl2_jax.model.weights`. Whole weights that the adapter brings along stand in the places
      of the model's.

    Raises:
      CheckpointError: the adapter was trained on another checkpoint, as far as the two tell.
    """
    check_base(settings, base_digest(params), source)
    flat = flatten_dict(params, is_leaf=lambda _, value: is_stored_weight(value))
    dtype = compute_dtype(params)
    for path, arrays in flatten_dict(adapter, is_leaf=lambda _, value: "lora_a" in value).items():
        whole = arrays.get("base") if isinstance(arrays, Mapping) else arrays
        if whole is not None:
            old = jax.tree.leaves(flat[path])[0]
            flat[path] = jax.device_put(np.asarray(whole, old.dtype if old is flat[path] else dtype), old.sharding)
        if isinstance(arrays, Mapping):
            factor = np.float32(settings.factor(path_name(path)))
            scaled = {**arrays, "lora_b": np.asarray(arrays["lora_b"], np.float32) * factor}
            flat[path] = adapted(flat[path], config, path, scaled, dtype, mesh)
    return unflatten_dict(flat)


def adapted(
    base: Any, config: Config, path: LeafPath, arrays: Mapping[str, np.ndarray], dtype: jnp.dtype, mesh: Mesh | None
) -> dict[str, Any]:
    """One weight with its adapter, placed where its base lies.

    Args:
      base: array or quantized dict of the parameter ``path``.
      arrays: "lora_a", "lora_b" (times the factor), and of DoRA "magnitude".
      dtype: of what is multiplied.
    """
    leaf = {leaf.path: leaf for leaf in rules.expand(config)}[path]
    axes = array_axes(config, leaf)

    def placed(name: str, dtype: Any) -> jax.Array:
        array = np.asarray(arrays[name], dtype)
        if mesh is None:
            return jax.device_put(array, jax.tree.leaves(base)[0].sharding)
        spec = partition_spec(array.shape, axes[name], dict(mesh.shape), PARAM_RULES)
        return jax.device_put(array, NamedSharding(mesh, spec))

    out = {"base": base, "lora_a": placed("lora_a", dtype), "lora_b": placed("lora_b", dtype)}
    if "magnitude" not in arrays:
        return out
    # In float32, as the norm is: rounding the factors first would change what the magnitudes were trained with.
    exact = {name: placed(name, np.float32) for name in ("lora_a", "lora_b", "magnitude")}
    one_by_one = leaf.stacked and mesh is None
    return out | {"gain": _gain({"base": base, **exact}, leaf.inputs[-1] - len(leaf.shape), one_by_one)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gain(stored: dict[str, Any], packed_axis: int, one_by_one: bool) -> jax.Array:
    """magnitude / norm of a weight of DoRA; ``one_by_one``: of each expert apart, so that one of them is in memory."""
    if one_by_one:
        return lax.map(lambda expert: weight_of(expert, packed_axis).gain, stored)
    return weight_of(stored, packed_axis).gain


def merged_weight(base: np.ndarray, leaf: rules.Leaf, arrays: Mapping[str, np.ndarray], factor: float) -> np.ndarray:
    """A parameter with its adapter added, in float32, then in its own dtype; one expert or some outputs at a time.

    Args:
      base: of the parameter ``leaf``.
      arrays: "lora_a", "lora_b" and of DoRA "magnitude", of any float dtype.
      factor: of the adapter.
    """
    axis = 0 if leaf.stacked else leaf.outputs[0]
    step = 1 if leaf.stacked else -(-_MERGED_AT_ONCE * base.shape[axis] // base.size)
    # The axis of experts, or the first one of outputs, in each of the arrays; lora_a has no outputs.
    axes = {"base": axis, "lora_a": 0 if leaf.stacked else None, "lora_b": 0 if leaf.stacked else 1, "magnitude": 0}
    scaled = {**arrays, "base": base, "lora_b": np.asarray(arrays["lora_b"], np.float32) * np.float32(factor)}

    def part(array: np.ndarray, at: int | None, start: int) -> np.ndarray:
        return array if at is None else array[(slice(None),) * at + (slice(start, start + step),)]

    out = np.empty_like(base)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for start in range(0, base.shape[axis], step):
            parts = {name: part(array, axes[name], start) for name, array in scaled.items()}
            part(out, axis, start)[...] = _merged(parts, leaf.inputs[-1] - len(leaf.shape))
    return out


@functools.partial(jax.jit, static_argnums=1)
def _merged(stored: dict[str, Any], packed_axis: int) -> jax.Array:
    stored = {name: array if name == "base" else array.astype(jnp.float32) for name, array in stored.items()}
    return merged(weight_of(stored, packed_axis), packed_axis).astype(stored["base"].dtype)


def array_axes(config: Config, leaf: rules.Leaf) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of a parameter's ``lora_a``, ``lora_b`` and ``magnitude``; the rank has none."""
    axes = abstract_leaves(config)[leaf.path][1]
    lead = axes[: int(leaf.stacked)]
    inputs, outputs = (tuple(axes[axis] for axis in part) for part in (leaf.inputs, leaf.outputs))
    return {"lora_a": (*lead, *inputs, None), "lora_b": (*lead, None, *outputs), "magnitude": (*lead, *outputs)}


def check_base(settings: AdapterSettings, digest: str, source: str | Path) -> None:
    """Raises CheckpointError when an adapter was trained on a checkpoint with another digest."""
    # Of a quantized base the second half, of its matrices, is not known.
    known = [
        pair for pair in zip((settings.base_digest or "").split("-"), digest.split("-"), strict=False) if all(pair)
    ]
    if any(theirs != ours for theirs, ours in known):
        trained_on = settings.base or "a checkpoint whose name is not known"
        raise CheckpointError(
            f"{source}: the adapter was trained on another checkpoint ({trained_on}, digest {settings.base_digest}; "
            f"this one has {digest}). Give that checkpoint, or train an adapter on this one."
        )


def base_digest(params: Params) -> str:
    """`BaseDigest` of a model's parameters, nested; of weights with an adapter, their base counts."""
    digest = BaseDigest()
    for path, value in flatten_dict(params, is_leaf=lambda _, value: is_stored_weight(value)).items():
        digest.add(path, value)
    return digest.result()


class BaseDigest:
    """Tells checkpoints apart, by their vectors (norms, biases) and a few numbers of each matrix.

    It does not depend on the layout nor on whether numbers are in float32 or bfloat16. Of a checkpoint with quantized
    matrices it has its first half alone.
    """

    def __init__(self) -> None:
        self._vectors: dict[str, bytes] = {}
        self._matrices: dict[str, bytes] = {}
        self._quantized = False

    def add(self, path: LeafPath, value: Any) -> None:
        """Adds a parameter: an array, or a dict in its place."""
        if path[: len(rules.UNUSED_PATH)] == rules.UNUSED_PATH:
            return
        while isinstance(value, Mapping) and "base" in value:
            value = value["base"]
        if isinstance(value, Mapping):
            self._quantized = True
        elif value.ndim == 1:
            self._vectors[path_name(path)] = _bytes(value)
        else:
            value = np.asarray(value) if _in_host_memory(value) else value  # a view; jax would compile each shape's
            self._matrices[path_name(path)] = _bytes(value[(0,) * (value.ndim - 1)][:_SAMPLE])

    def result(self) -> str:
        halves = [self._vectors] if self._quantized else [self._vectors, self._matrices]
        return "-".join(_digest(half) for half in halves)


def _in_host_memory(array: Any) -> bool:
    return not isinstance(array, jax.Array) or (
        array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())
    )


def _bytes(array: Any) -> bytes:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array).astype(ml_dtypes.bfloat16).tobytes()


def _digest(parts: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(parts.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()[:16]
