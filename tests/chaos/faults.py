"""The fault layer: what a process meets on its disk and its clock (faults.c), and how it is told so.

A `Fault` becomes variables of the environment. Calls are counted in a page of memory that the process shares with the
one that watches it, so that a call to fail, or to be killed at, can be drawn from all that an undisturbed run makes.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
CREATE, WRITE, SYNC, RENAME, REMOVE = 1, 2, 4, 8, 16
EVERY = CREATE | WRITE | SYNC | RENAME | REMOVE
COUNTS = struct.Struct("=qqq")  # calls, those of the fault's kinds, looks at the clock


@dataclasses.dataclass(frozen=True)
class Fault:
    """From the call number ``after`` of its kinds on, ``times`` calls (−1: all) fail or kill the process."""

    kinds: int = 0
    error: int = 0  # errno
    kill: bool = False
    after: int = 0
    times: int = -1
    partial_writes: bool = False  # write half of what was asked
    slow: int = 0  # microseconds before each write
    clock_after: int = -1  # looks at the clock until it jumps, and until it jumps back
    clock_offset: int = 0  # seconds

    def environment(self, prefix: Path, counts: Path) -> dict[str, str]:
        """For files below ``prefix``."""
        values = {
            "PREFIX": prefix,
            "COUNTS": counts,
            "KINDS": self.kinds,
            "ERRNO": self.error,
            "KILL": int(self.kill),
            "AFTER": self.after,
            "TIMES": self.times,
            "SHORT": int(self.partial_writes),
            "SLOW": self.slow,
            "CLOCK_AFTER": self.clock_after,
            "CLOCK_OFFSET": self.clock_offset,
        }
        return {f"CHAOS_{name}": str(value) for name, value in values.items()}

    def __str__(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = [f"{f.name}={fields[f.name]}" for f in dataclasses.fields(self) if fields[f.name] != f.default]
        name = errno.errorcode.get(self.error, "")
        return " ".join([*([name] if name else []), *changed])


def build(folder: Path) -> Path | None:
    """Compiles the layer; None without gcc."""
    if shutil.which("gcc") is None:
        return None
    library = folder / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def new_counts(file: Path) -> Path:
    """A page of counts, at zero."""
    file.write_bytes(bytes(COUNTS.size))
    return file


def calls(counts: Path) -> int:
    """How many calls on files below the prefix were made."""
    return COUNTS.unpack(counts.read_bytes())[0]
