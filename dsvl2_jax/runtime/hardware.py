"""Accelerators that programs can be compiled for without having one, and what a device of each can do.

Figures are the vendors' own, dense bfloat16.

Names are those of Cloud TPU, where v5p-8 counts cores and has 4 chips; a chip of TPU7x is two devices.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from dsvl2_jax.errors import UsageError
from dsvl2_jax.messages import did_you_mean


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, joined.

    Attributes:
      platform: "tpu" or "cuda".
      shape: what the compiler calls the topology, as ``v5e:4x4``; of GPUs the kind alone, as ``h100``.
      devices: jax devices, which are what a mesh is made of.
      flops: most bfloat16 FLOP/s of a device.
      memory: bytes of a device.
      bandwidth: bytes/s between a device and its memory.
    """

    name: str
    platform: str
    shape: str
    devices: int
    flops: float
    memory: float
    bandwidth: float


# Generation → platform, FLOP/s, bytes and bytes/s of a chip, devices of a chip.
_CHIPS = {
    "v5e": ("tpu", 197e12, 16e9, 819e9, 1),
    "v5p": ("tpu", 459e12, 95 * 2.0**30, 2765e9, 1),
    "v6e": ("tpu", 918e12, 32 * 2.0**30, 1638e9, 1),
    "tpu7x": ("tpu", 2307e12, 192 * 2.0**30, 7380e9, 2),
    "h100": ("cuda", 989e12, 80e9, 3350e9, 1),
    "h200": ("cuda", 989e12, 141e9, 4800e9, 1),
}
# Name → arrangement of the chips.
_ARRANGED = {
    "v5e-1": (1, 1), "v5e-4": (2, 2), "v5e-8": (2, 4), "v5e-16": (4, 4),
    "v5p-8": (2, 2, 1), "v5p-16": (2, 2, 2),
    "v6e-1": (1, 1), "v6e-4": (2, 2), "v6e-8": (2, 4), "v6e-16": (4, 4),
    "tpu7x-8": (2, 2, 1),
    **{f"{kind}-{count}": (count,) for kind in ("h100", "h200") for count in (1, 2, 4, 8)},
}  # fmt: skip


def _topology(name: str) -> Topology:
    kind = name.partition("-")[0]
    platform, flops, memory, bandwidth, split = _CHIPS[kind]
    chips = 1
    for size in _ARRANGED[name]:
        chips *= size
    shape = f"{kind}:{'x'.join(map(str, _ARRANGED[name]))}" if platform == "tpu" else kind
    return Topology(name, platform, shape, chips * split, flops / split, memory / split, bandwidth / split)


TOPOLOGIES = {name: _topology(name) for name in _ARRANGED}


# Fields of h100.txtpb that differ for an H200.
_H200 = {
    "memory_bandwidth": "4800000000000",
    "device_memory_size": "150754820096",
    "device_description_str": '"NVIDIA H200"',
}


def target_config(target: Topology) -> str:
    """What XLA's GPU compiler must know of a GPU that is not here: a GpuTargetConfigProto as text."""
    text = Path(__file__).with_name("h100.txtpb").read_text(encoding="utf-8")
    for field, value in _H200.items() if target.shape == "h200" else ():
        text = re.sub(rf'\b{field}: (?:"[^"]*"|\d+)', f"{field}: {value}", text)
    return text


def topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
      UsageError: there is none of this name.
    """
    if name not in TOPOLOGIES:
        raise UsageError(f"topology {name!r} is none of {', '.join(TOPOLOGIES)}{did_you_mean(name, TOPOLOGIES)}")
    return TOPOLOGIES[name]
