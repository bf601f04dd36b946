"""Logical axes → mesh axes: one table for parameters, one for activations.

The mesh has the axes ``data``, ``tensor`` and ``expert`` (DESIGN §4.5). Modules name *logical* axes;
this file alone knows what they map to. A dimension that its mesh axis does not divide is replicated
and the reason logged, never an error; one array never maps a mesh axis twice.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsvl2_jax.errors import UsageError

log = logging.getLogger(__name__)

MESH_AXES = ("data", "tensor", "expert")

# Parameters with fewer entries are not split over `data`.
MIN_SPLIT_SIZE = 1 << 14

# None = replicated. A tuple = split over the product of those mesh axes.
PARAM_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "latent": None,
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": "tensor",
    "router_expert": None,
    "vision_embed": None,
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "adaptor_mlp": "tensor",
}

ACTIVATION_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": "data",
    "length": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "latent": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "tiles": ("data", "tensor", "expert"),
}


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def partition_spec(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh_shape: Mapping[str, int],
    rules: Mapping[str, str | tuple[str, ...] | None],
) -> PartitionSpec:
    """The PartitionSpec of one array.

    Args:
      shape: the array's dimensions.
      axes: one logical axis name (or None) per dimension.
      mesh_shape: mesh axis name → size.
      rules: `PARAM_RULES` or `ACTIVATION_RULES`.

    Raises:
      ValueError: two dimensions of the array map to the same mesh axis, or a name has no rule.
    """
    if len(shape) != len(axes):
        raise ValueError(f"array of shape {tuple(shape)} has {len(axes)} logical axes: {tuple(axes)}")
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} of {tuple(axes)} has no rule; the table has {', '.join(rules)}")
        target = rules[axis] if axis is not None else None
        names = tuple(n for n in ((target,) if isinstance(target, str) else target or ()) if mesh_shape.get(n, 1) > 1)
        if used.intersection(names):
            raise ValueError(f"logical axes {tuple(axes)} map mesh axis {used.intersection(names)} twice")
        parts = math.prod(mesh_shape[n] for n in names)
        if size % parts:
            _log_once(f"axis {axis} of size {size} does not divide over {'×'.join(names)} = {parts}: replicated")
            names = ()
        used.update(names)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def split_over_data(
    spec: PartitionSpec, shape: Sequence[int], mesh_shape: Mapping[str, int], *, layers: bool = False
) -> PartitionSpec:
    """A parameter's spec with its largest unsplit dimension split over ``data`` too (FSDP, for training).

    Small parameters, and those without a dimension that ``data`` divides, stay whole: gathering them costs more than
    it saves. With ``layers``, the first dimension counts stacked layers and stays whole.
    """
    parts = mesh_shape.get("data", 1)
    free = [i for i in range(int(layers), len(shape)) if spec[i] is None and shape[i] % parts == 0]
    if parts == 1 or not free or math.prod(shape) < MIN_SPLIT_SIZE:
        return spec
    largest = max(free, key=lambda i: shape[i])
    return PartitionSpec(*(("data" if i == largest else entry) for i, entry in enumerate(spec)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation by its logical axes, under `jax.set_mesh`; without a mesh, does nothing."""
    mesh_shape = ambient_mesh_shape()
    if mesh_shape is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh_shape, ACTIVATION_RULES))


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


def make_mesh(data: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ``data × tensor × expert`` mesh with automatic axes.

    Raises:
      UsageError: the product is not the number of devices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes = (data, tensor, expert)
    check_mesh(dict(zip(MESH_AXES, sizes, strict=True)), len(devices))
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses ``data=2,tensor=2,expert=2``; axes not named are 1.

    Raises:
      UsageError: an unknown axis, one named twice, or a size that is not a positive whole number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if name.strip() not in MESH_AXES:
            raise UsageError(f"--mesh: unknown axis {name!r}; the axes are {', '.join(MESH_AXES)}.")
        if name.strip() in sizes:
            raise UsageError(f"--mesh: {name.strip()} is given twice; give each axis one size.")
        if not value.strip().isdigit() or int(value) < 1:
            raise UsageError(f"--mesh: {part!r} needs a positive whole number, as in data=2,tensor=2,expert=2.")
        sizes[name.strip()] = int(value)
    return dict.fromkeys(MESH_AXES, 1) | sizes
