"""Which kernel, with which block sizes, an operation takes on the GPU that is here: what was measured on it.

`dsvl2 bench tune` writes a table of measurements, and `chosen` reads it when a program is traced. Without a table, and
for shapes that are in none, the Triton kernels run with their own block sizes. A table holds for one kind of GPU, one
release of jax and these very kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dsvl2_jax.kernels.block_sizes import KERNELS, Blocks, kernel_of
from dsvl2_jax.runtime.compile_cache import others_may_write, user_cache

FORMAT = 1
# Sizes that may differ by a factor of two from what was measured. All others must be equal.
_NEARBY = ("rows", "length", "heads")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU: jax's ``device_kind``, and the compute capability, as "9.0"."""

    kind: str
    capability: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest blocks of an operation at a shape.

    Attributes:
      shape: sizes by name.
      seconds: median of a call.
    """

    operation: str
    shape: Mapping[str, int]
    blocks: Blocks
    seconds: float


@dataclasses.dataclass(frozen=True)
class Table:
    """Measurements of one kind of GPU; ``digest`` tells tables apart."""

    entries: tuple[Entry, ...]
    digest: str

    def find(self, operation: str, shape: Mapping[str, int]) -> Blocks | None:
        """The blocks measured at the nearest shape; None: at none that is near enough."""
        distances = [(_distance(shape, e.shape), i) for i, e in enumerate(self.entries) if e.operation == operation]
        distance, index = min(distances, default=(math.inf, 0))
        return self.entries[index].blocks if distance < math.inf else None


def _distance(shape: Mapping[str, int], other: Mapping[str, int]) -> float:
    """How far two shapes are apart, in powers of two; infinite if one is not to be taken for the other."""
    if shape.keys() != other.keys():
        return math.inf
    distance = 0.0
    for name, size in shape.items():
        if name not in _NEARBY:
            if size != other[name]:
                return math.inf
            continue
        apart = abs(math.log2(max(size, 1) / max(other[name], 1)))
        if apart > 1:
            return math.inf
        distance += apart
    return distance


def chosen(operation: str, **shape: int) -> Blocks | None:
    """The measured blocks of an operation of bfloat16 arrays on the GPU that is here; None: the default ones.

    Args:
      operation: of `KERNELS`.
      shape: its sizes, by the names under which `dsvl2_jax.apps.bench.tune_cases` measures them.
    """
    table = current_table()
    return None if table is None else table.find(operation, shape)


def this_gpu() -> Gpu | None:
    """The GPUs of this process, if it computes on GPUs of one kind."""
    if jax.default_backend() != "gpu":
        return None
    kinds = {(device.device_kind, str(getattr(device, "compute_capability", ""))) for device in jax.local_devices()}
    return Gpu(*kinds.pop()) if len(kinds) == 1 else None


@functools.cache
def current_table() -> Table | None:
    """The table of the GPU that is here, read once.

    Processes that share a model must run the same programs, and may find different tables: they read none.
    """
    gpu = this_gpu()
    if gpu is None or jax.process_count() > 1:
        return None
    path = table_path(gpu)
    return read_table(path, gpu) if path.exists() else None


def table_digest() -> str:
    """Tells programs apart that were traced with different tables."""
    table = current_table()
    return "" if table is None else table.digest


def table_path(gpu: Gpu) -> Path:
    """Where a GPU's table lies: beside the compiled programs."""
    return user_cache() / "tuning" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', gpu.kind)}.json"


def kernel_sources() -> str:
    """A digest of the kernels, which a table is measured with."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_table(path: Path, gpu: Gpu, entries: list[dict[str, Any]]) -> None:
    """Writes what was measured; ``entries`` as `entry_json` gives them. Whole or not at all."""
    content = _header(gpu) | {"entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def entry_json(operation: str, shape: Mapping[str, int], blocks: Blocks, seconds: float) -> dict[str, Any]:
    """An `Entry` as it is written."""
    return {
        "operation": operation,
        "shape": dict(shape),
        "kernel": kernel_of(operation, blocks),
        "blocks": dataclasses.asdict(blocks),
        "seconds": seconds,
    }


def _header(gpu: Gpu) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "device": gpu.kind,
        "compute_capability": gpu.capability,
        "jax": jax.__version__,
        "kernels": kernel_sources(),
    }


def read_table(path: Path, gpu: Gpu) -> Table | None:
    """The table of a file; None, with one warning, if it is broken, or not of this GPU, this jax and these kernels."""
    try:
        with path.open("rb") as file:
            if others_may_write(os.fstat(file.fileno())):
                raise ValueError("others can write to it")
            raw = file.read()
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        for name, expected in _header(gpu).items():
            if (found := content.get(name)) != expected:
                if name == "kernels":
                    raise ValueError("it was measured with other kernels")
                raise ValueError(f"it has {name} {found!r}, and {expected!r} was expected")
        entries = tuple(_entry(entry) for entry in content["entries"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        warnings.warn(
            f"{path}: this table of block sizes is not used: {_reason(error)}. `dsvl2 bench tune` writes a new one.",
            stacklevel=2,
        )
        return None
    return Table(entries, hashlib.sha256(raw).hexdigest())


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return str(error) or type(error).__name__


def _entry(content: Mapping[str, Any]) -> Entry:
    operation, shape = content["operation"], content["shape"]
    sizes = KERNELS.get(operation, {}).get(content["kernel"])
    if sizes is None:
        raise ValueError(f"there is no kernel {content['kernel']!r} of {operation!r}")
    numbers = {**shape, **content["blocks"]}
    if not all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers.values()):
        raise ValueError(f"an entry of {operation!r} has sizes that are no whole numbers")
    if 0 in content["blocks"].values():
        raise ValueError(f"an entry of {operation!r} has a block of size 0")
    return Entry(operation, shape, sizes(**content["blocks"]), float(content["seconds"]))
