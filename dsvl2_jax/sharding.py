"""Logical axes → mesh axes: one table for parameters, one for activations.

The mesh has the axes ``data``, ``tensor`` and ``expert``, and in training perhaps ``sequence``, over which rows are
split along their length. Modules name *logical* axes; this file alone knows what they
map to. A dimension is split over those axes of its rule that divide it and that earlier dimensions of the array have
left free; a parameter's dimension that stays whole for this reason is logged, never an error.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsvl2_jax.errors import UsageError

log = logging.getLogger(__name__)

MESH_AXES = ("data", "tensor", "expert")
SEQUENCE = "sequence"  # a fourth axis, of meshes that split rows along their length

# Parameters with fewer entries are not split over further axes in training.
MIN_SPLIT_SIZE = 1 << 14

Rules = Mapping[str, tuple[str, ...]]

# Of the decoder, everything large is split over `tensor` and `expert`, so that a decode step reads each weight on one
# device of a data shard only. `tensor` leads: gathering such a weight over `expert`, as prefill and training do, leaves
# what `tensor` alone would have split. The encoder works on whole tiles, spread over all devices: its weights are not
# split.
PARAM_RULES: Rules = {
    "vocab": ("tensor", "expert"),
    "embed": (),
    "heads": ("tensor", "expert"),
    "kv_heads": ("tensor", "expert"),
    "head_dim": (),
    "mha_head_dim": ("tensor", "expert"),  # what the heads leave free: tiny's 10 divide by neither 4 nor 8
    "latent": (),
    "mlp": ("tensor", "expert"),
    "expert": ("expert",),
    "expert_mlp": ("tensor",),
    "router_expert": (),
    "vision_embed": (),
    "vision_heads": (),
    "vision_mlp": (),
    "adaptor_mlp": (),
}

ACTIVATION_RULES: Rules = {
    "batch": ("data", "expert"),  # of prefill and training
    "decode_batch": ("data",),  # of a decode step, where the weights stay and a few tokens visit them
    "logits_batch": ("data",),  # of training's logits, where the vocabulary stays split and the tokens visit it
    "slots": ("data", "tensor", "expert"),  # rows of the cache, and of all that meets it
    "cache_length": ("data", "tensor", "expert"),  # positions; they take the axes that few slots leave free
    "length": (SEQUENCE,),
    "embed": (),
    "heads": ("tensor", "expert"),
    "kv_heads": ("tensor", "expert"),
    "head_dim": (),
    "mha_head_dim": ("tensor", "expert"),  # of a decode step's projections, which stay where their weights are
    "latent": (),
    "mlp": ("tensor", "expert"),
    "vocab": ("tensor", "expert"),
    "tiles": ("data", "expert", "tensor", SEQUENCE),
    "features": ("data", "tensor", "expert"),  # the width of what a prompt's pictures gave, from which chunks take rows
}


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def partition_spec(
    shape: Sequence[int], axes: Sequence[str | None], mesh_shape: Mapping[str, int], rules: Rules
) -> PartitionSpec:
    """The PartitionSpec of one array, which maps no mesh axis twice.

    Args:
      shape: the array's dimensions.
      axes: one logical axis name (or None) per dimension.
      mesh_shape: mesh axis name → size.
      rules: `PARAM_RULES` or `ACTIVATION_RULES`.

    Raises:
      ValueError: not one name per dimension, or a name has no rule.
    """
    if len(shape) != len(axes):
        raise ValueError(f"array of shape {tuple(shape)} has {len(axes)} logical axes: {tuple(axes)}")
    used: set[str] = set()
    entries: list[tuple[str, ...]] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} of {tuple(axes)} has no rule; the table has {', '.join(rules)}")
        split = _dividing(size, rules[axis] if axis else (), mesh_shape, used)
        used.update(split)
        entries.append(split)
    for size, axis in zip(shape, axes, strict=True) if rules is PARAM_RULES else ():
        for name in rules[axis] if axis else ():
            if mesh_shape.get(name, 1) > 1 and name not in used:
                _log_once(f"axis {axis} of size {size} does not divide over {name} = {mesh_shape[name]}: replicated")
    return _spec(entries)


def _dividing(size: int, names: Sequence[str], mesh_shape: Mapping[str, int], used: set[str]) -> tuple[str, ...]:
    """Those of ``names`` that are free and, one after the other, divide ``size``."""
    dividing: tuple[str, ...] = ()
    for name in names:
        parts = mesh_shape.get(name, 1)
        if parts > 1 and name not in used and size % parts == 0:
            dividing += (name,)
            size //= parts
    return dividing


def _spec(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in entries))


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def add_fsdp_axis(
    spec: PartitionSpec, shape: Sequence[int], mesh_shape: Mapping[str, int], *, layers: bool = False
) -> PartitionSpec:
    """A parameter's spec with one more dimension split over the mesh axes that it leaves free (FSDP, for training).

    Small parameters, and those without a whole dimension that such an axis divides, stay as they are: gathering them
    costs more than it saves. With ``layers``, the first dimension counts stacked layers and stays whole.
    """
    entries = [mesh_axes(entry) for entry in spec]
    used = {name for entry in entries for name in entry}
    splits = {
        i: _dividing(shape[i], (*MESH_AXES, SEQUENCE), mesh_shape, used)
        for i in range(int(layers), len(shape))
        if not entries[i]
    }
    if not splits or math.prod(shape) < MIN_SPLIT_SIZE:
        return spec
    best = max(splits, key=lambda i: (math.prod(mesh_shape[name] for name in splits[i]), shape[i]))
    entries[best] = splits[best]
    return _spec(entries)


def batch_parts(mesh_shape: Mapping[str, int]) -> int:
    """Into how many data shards a mesh splits the rows of a batch that it divides."""
    return math.prod(mesh_shape.get(name, 1) for name in ACTIVATION_RULES["batch"])


def axes_of(name: str, mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that an activation's logical axis is split over if they divide it."""
    return tuple(axis for axis in ACTIVATION_RULES[name] if axis in mesh.axis_names)


def batch_axis(decode: bool) -> str:
    """Logical name of the first axis of activations [B, T, …], of a decode step or of anything else."""
    return "decode_batch" if decode else "batch"


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation by its logical axes, under `jax.set_mesh`; without a mesh, does nothing."""
    mesh_shape = ambient_mesh_shape()
    if mesh_shape is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh_shape, ACTIVATION_RULES))


def split_over(shape: Sequence[int], axes: Sequence[str | None], dimension: int) -> tuple[tuple[str, ...], int]:
    """The axes of the ambient mesh that an activation's dimension is split over, and into how many parts."""
    sizes = ambient_mesh_shape() or {}
    names = mesh_axes(partition_spec(shape, axes, sizes, ACTIVATION_RULES)[dimension])
    return names, math.prod(sizes[name] for name in names)


def shard_map_kernel(
    function: Callable[..., Any],
    in_axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[Sequence[str | None]],
    out_like: Sequence[Any] | None = None,
) -> Callable[..., Any]:
    """A kernel that each device runs on its own part of the arguments; without a mesh, the kernel itself.

    XLA cannot split kernels: it would gather their arguments on every device.

    Args:
      function: from arrays to a tuple of arrays.
      in_axes, out_axes: logical axes of each argument and result, of `ACTIVATION_RULES`.
      out_like: arrays with the shapes of the results, needed where ``function`` communicates between devices.
    """

    def call(*arrays: jax.Array) -> Any:
        sizes = ambient_mesh_shape()
        if sizes is None:
            return function(*arrays)

        def specs(shapes: Sequence[Any], axes: Sequence[Sequence[str | None]]) -> tuple[PartitionSpec, ...]:
            return tuple(partition_spec(a.shape, b, sizes, ACTIVATION_RULES) for a, b in zip(shapes, axes, strict=True))

        outs = specs(jax.eval_shape(function, *arrays) if out_like is None else out_like, out_axes)
        return jax.shard_map(function, in_specs=specs(arrays, in_axes), out_specs=outs, check_vma=False)(*arrays)

    return call


def ambient_mesh_shape() -> dict[str, int] | None:
    """Axis sizes of the mesh of `jax.set_mesh` when it splits anything, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return dict(mesh.shape)


def check_mesh(sizes: Mapping[str, int], devices: int) -> None:
    """Raises UsageError when the product of the axes is not the number of devices."""
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
        spelled = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise UsageError(
            f"mesh {spelled} needs {math.prod(sizes.values())} devices, but there are {devices}; "
            "choose sizes whose product is the number of devices."
        )


def make_mesh(
    data: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    sequence: int = 1,
) -> Mesh:
    """A ``data × tensor × expert`` mesh with automatic axes; with ``sequence`` above 1, ``× sequence``.

    Devices are placed so that an axis runs along the links of a TPU slice; several slices share the ``data`` axis, the
    one that moves the least.

    Raises:
      UsageError: the product is not the number of devices, or several slices do not divide ``data``.
    """
    devices = list(devices) if devices is not None else jax.devices()
    axes = MESH_AXES if sequence == 1 else (*MESH_AXES, SEQUENCE)
    sizes = (data, tensor, expert, sequence)[: len(axes)]
    check_mesh(dict(zip(axes, sizes, strict=True)), len(devices))
    # Not jax.make_mesh: except on v5e it refuses an axis that ends within a row of chips (data=8 of 4 × 4), and it
    # refuses several slices.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if data % slices:
        raise UsageError(f"mesh data={data}: {slices} TPU slices are used, so data must be a multiple of {slices}.")
    if slices > 1:
        of_slice, apart = (data // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(of_slice, apart, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))


def parse_mesh(text: str) -> dict[str, int]:
    """Parses ``data=2,tensor=2,expert=2``; axes not named are 1, and ``sequence`` is there only above 1.

    Raises:
      UsageError: an unknown axis, one named twice, or a size that is not a positive whole number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if name.strip() not in (*MESH_AXES, SEQUENCE):
            known = ", ".join((*MESH_AXES, SEQUENCE))
            raise UsageError(f"--mesh: unknown axis {name!r}; the axes are {known} (in training).")
        if name.strip() in sizes:
            raise UsageError(f"--mesh: {name.strip()} is given twice; give each axis one size.")
        if not value.strip().isdigit() or int(value) < 1:
            raise UsageError(f"--mesh: {part!r} needs a positive whole number, as in data=2,tensor=2,expert=2.")
        sizes[name.strip()] = int(value)
    if sizes.get(SEQUENCE) == 1:
        del sizes[SEQUENCE]
    return dict.fromkeys(MESH_AXES, 1) | sizes
