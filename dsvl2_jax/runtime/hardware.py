"""Accelerators: what a device of each can do, and the compilers' targets for programs that need none of them here.

The figures are the vendors', dense bfloat16. Names are those of Cloud TPU, where v5p-8 counts cores and has 4 chips; a
chip of TPU7x is two devices.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import UsageError
from dsvl2_jax.messages import did_you_mean, first_line


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

    def seconds(self, flops: float, moved: float) -> float:
        """The least that so many FLOPs and bytes of a device take."""
        return max(flops / self.flops, moved / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A vendor's figures for one chip.

    Attributes:
      platform: "tpu" or "cuda".
      flops: most bfloat16 FLOP/s, without sparsity.
      memory: bytes.
      bandwidth: bytes/s to and from that memory.
      kind: pattern of the `jax.Device.device_kind` of its devices.
      devices: jax devices that it is split into.
    """

    platform: str
    flops: float
    memory: float
    bandwidth: float
    kind: str
    devices: int = 1


_CHIPS = {
    "v5e": _Chip("tpu", 197e12, 16e9, 819e9, r"TPU (v5 lite|v5e)"),
    "v5p": _Chip("tpu", 459e12, 95 * 2.0**30, 2765e9, r"TPU (v5|v5p)"),
    "v6e": _Chip("tpu", 918e12, 32 * 2.0**30, 1638e9, r"TPU (v6 lite|v6e)"),
    "tpu7x": _Chip("tpu", 2307e12, 192 * 2.0**30, 7380e9, r"TPU ?(7x|v7x)", devices=2),
    # The SXM module; PCIe cards are slower and are named otherwise.
    "h100": _Chip("cuda", 989e12, 80e9, 3350e9, r"NVIDIA H100 80GB HBM3"),
    "h200": _Chip("cuda", 989e12, 141e9, 4800e9, r"NVIDIA H200"),
}
# Name → arrangement of the chips.
_ARRANGEMENTS = {
    "v5e-1": (1, 1), "v5e-4": (2, 2), "v5e-8": (2, 4), "v5e-16": (4, 4),
    "v5p-8": (2, 2, 1), "v5p-16": (2, 2, 2),
    "v6e-1": (1, 1), "v6e-4": (2, 2), "v6e-8": (2, 4), "v6e-16": (4, 4),
    "tpu7x-8": (2, 2, 1),
    **{f"{kind}-{count}": (count,) for kind in ("h100", "h200") for count in (1, 2, 4, 8)},
}  # fmt: skip


def _topology(name: str) -> Topology:
    kind, arrangement = name.partition("-")[0], _ARRANGEMENTS[name]
    chip = _CHIPS[kind]
    shape = f"{kind}:{'x'.join(map(str, arrangement))}" if chip.platform == "tpu" else kind
    per_device = (value / chip.devices for value in (chip.flops, chip.memory, chip.bandwidth))
    return Topology(name, chip.platform, shape, math.prod(arrangement) * chip.devices, *per_device)


TOPOLOGIES = {name: _topology(name) for name in _ARRANGEMENTS}


# What XLA must know of an H200 that differs from h100.txtpb.
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


def peaks(device_kind: str) -> tuple[float, float] | None:
    """bfloat16 FLOP/s, and bytes/s to and from its memory, that a device can reach at most.

    Args:
      device_kind: of its `jax.Device`; None for kinds not listed.
    """
    for chip in _CHIPS.values():
        if re.fullmatch(chip.kind, device_kind):
            return chip.flops / chip.devices, chip.bandwidth / chip.devices
    return None


def peak_flops(device_kind: str) -> float | None:
    """The first of `peaks`."""
    found = peaks(device_kind)
    return None if found is None else found[0]


class CompilerMissing(UsageError):
    """The compiler for a platform is not installed, or cannot be used."""


def compile_devices(topology: Topology) -> list[Any]:
    """Descriptions of a topology's devices, from the compiler for it.

    Raises:
      CompilerMissing: the compiler is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any]
    if topology.platform == "cuda":
        options = {"target_config": target_config(topology), "topology": f"1x1x{topology.devices}"}
        name, extra = "", "cuda"
    else:
        # Without these libtpu asks Google's metadata server where it runs, and wants the device to itself.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # A host has four chips, unless it is said to have one.
        options = {"chips_per_host_bounds": (1, 1, 1)} if topology.devices == 1 else {}
        name, extra = topology.shape, "tpu"
    try:
        described = topologies.get_topology_desc(platform=topology.platform, topology_name=name, **options)
        return list(described.devices)
    except Exception as error:  # RuntimeError, XlaRuntimeError, ModuleNotFoundError …
        compiler = "GPU" if extra == "cuda" else "TPU"
        raise CompilerMissing(
            f"{topology.name}: the {compiler} compiler cannot be used ({first_line(error)}); "
            f"install it with pip install -e '.[{extra}]'."
        ) from error


def device_memory(device: Any) -> float:
    """Bytes of a device; a CPU has the machine's, or what its container may use of it."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, float(text)) if text.isdecimal() else memory
