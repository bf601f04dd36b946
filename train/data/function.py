"""Records that a Python function makes, by number, instead of a file's: drawn pictures, or what needs code to be read.

The function is named by the user's own settings and imported by that name, in each process that reads samples.

Tested in tests/train/data/test_function.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax.errors import DataError, SampleError
from dsvl2_jax.inputs.image_sources import BAD_REFERENCE, FilePool
from dsvl2_jax.inputs.record_forms import type_name
from dsvl2_jax.inputs.records import BAD_RECORD
from dsvl2_jax.messages import did_you_mean

FUNCTION_FAILED = "function failed"  # the reason that samples are counted under when the function raises


@dataclasses.dataclass(frozen=True)
class FunctionRecords:
    """``function(index, **arguments)`` for each index from 0 to ``count`` - 1. Pickles by the function's name."""

    path: str  # the source's name, such as "data.train.drawn"
    function: str  # "module:name"
    arguments: Mapping[str, Any]
    count: int
    may_have_images = True

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def read(self, index: int, pool: FilePool) -> tuple[Mapping[str, Any], list[bytes]]:
        try:
            record = import_function(self.function)(index, **self.arguments)
        except (Exception, SystemExit) as error:  # whatever the user's code meets
            *_, last = traceback.extract_tb(error.__traceback__)
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            raise SampleError(
                FUNCTION_FAILED, f"{self.function} raised {type(error).__name__} at {where}: {error}"
            ) from error
        if not isinstance(record, Mapping):
            raise SampleError(BAD_RECORD, f"{self.function} gave {type_name(record)}, expected a dict with a record.")
        return record, []

    @property
    def digest(self) -> str:
        """SHA-256 of what makes the records what they are: name, arguments and number, and three records themselves.

        The latter, the first, the middle and the last, tell of changed code, wherever it lies.

        Raises DataError when the first record is another one each time, so that no run could continue exactly.
        """
        first = self._digest_of(0)
        if self._digest_of(0) != first:
            raise DataError(
                f"{self.path}: {self.function} gives another record each time it is asked for number 0, so that a run "
                "could not resume exactly. Make a record of its number and the arguments alone: seed random numbers by "
                "them, as numpy.random.default_rng([seed, index]) does."
            )
        said = [self.function, dict(self.arguments), self.count]
        parts = [json.dumps(said, sort_keys=True, default=str), first]
        parts += map(self._digest_of, (self.count // 2, self.count - 1))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _digest_of(self, index: int) -> str:
        digest = hashlib.sha256()
        try:
            for part in _parts(self.read(index, FilePool())[0]):
                digest.update(part)
        except SampleError as error:  # a broken sample, here too
            digest.update(error.reason.encode())
        return digest.hexdigest()


class NoNames:
    """The store of images of a function's records, which have no names: the function gives pictures themselves."""

    def find(self, name: str) -> Any:
        raise SampleError(
            BAD_REFERENCE,
            f"image {name[:80]!r}: a function gives its images themselves and not by name. Give a PIL image, an array "
            "or the bytes of a file, as pathlib.Path(name).read_bytes() reads them.",
        )

    def frames(self, name: str) -> None:
        return None


def open_function(label: str, function: str, arguments: Mapping[str, Any], count: int) -> FunctionRecords:
    """The records of ``[LABEL]``, whose function is imported but not called.

    Raises DataError: there is no such module or function, or it does not take these arguments.
    """
    try:
        found = import_function(function)
        signature = inspect.signature(found)
    except DataError as error:
        raise DataError(f"{label}.function: {error}") from error.__cause__
    except ValueError:  # of a function in C, which says nothing about its arguments
        return FunctionRecords(label, function, arguments, count)
    try:
        signature.bind(0, **arguments)
    except TypeError as error:
        raise DataError(
            f"{label}: {function} is called as {function.partition(':')[2]}(index, …) with [{label}.arguments], and "
            f"does not take them: {error}. It is defined with {signature}."
        ) from None
    return FunctionRecords(label, function, arguments, count)


@functools.cache
def import_function(function: str) -> Callable[..., Any]:
    """What "module:name" names. Raises DataError when there is none, or it cannot be called."""
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module's own code runs
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise DataError(
                f"{function}: there is no module {error.name}. Install it, or name the folder that it lies in: "
                "PYTHONPATH=FOLDER before the command."
            ) from None
        raise DataError(
            f"{function}: the module {module_name} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise DataError(f"{function}: the module {module_name} has no {name}{did_you_mean(name, functions)}")
    found = getattr(module, name)
    if not callable(found):
        raise DataError(f"{function}: is {type_name(found)}, expected a function.")
    return found


def _parts(value: Any) -> Iterator[bytes]:
    """What a record holds, as bytes that are the same in every process."""
    if isinstance(value, Mapping):
        yield b"{"
        for key, inner in value.items():
            yield from _parts(key)
            yield from _parts(inner)
        yield b"}"
    elif isinstance(value, list | tuple):
        yield b"["
        for inner in value:
            yield from _parts(inner)
        yield b"]"
    elif isinstance(value, Image.Image):
        yield f"{value.mode}{value.size}".encode()
        yield value.tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, bytes):
        yield value
    else:  # of other objects no more than their kind, since their words may have an address in memory
        known = isinstance(value, str | int | float | np.number | None)
        yield repr(value).encode("utf-8", "surrogatepass") if known else type(value).__qualname__.encode()
        yield b","
