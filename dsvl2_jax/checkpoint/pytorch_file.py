"""Where the tensors of a file of `torch.save` lie, without PyTorch and without running what a pickle may ask for.

Such a file is a zip archive: a pickle names the tensors, and each storage is an entry of its own, not compressed, so
that tensors can be read by byte range as from safetensors. A pickle is a program. This one may use only the opcodes
that tensors and dicts of them are made of, and may name only the functions and classes that `_Unpickler` replaces by
ours; all else is refused by name.
"""

from __future__ import annotations

import io
import lzma
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from dsvl2_jax.checkpoint.rules import Shape
from dsvl2_jax.checkpoint.safetensors_file import DOWNLOAD_AGAIN, Tensor, file_size
from dsvl2_jax.errors import CheckpointError

# Storage class of torch → (name of its dtype in safetensors, bytes of an element).
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
    "BINPERSID", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "EMPTY_DICT", "SETITEM",
    "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE",
}  # fmt: skip
_MAX_PICKLE = 64 << 20  # bytes; base's 5,800 tensors take 1 MB

# Copies of tensors that share memory, as safetensors wants them.
_REMEDY = (
    'Where PyTorch is, write its tensors as safetensors: python -c "import torch, safetensors.torch as s; '
    "s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{name}', map_location='cpu', "
    "weights_only=True).items()}}, '{stem}.safetensors')\""
)


# What reading raises of archives that are cut off, compressed in unknown ways or marked as encrypted.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, OSError, ValueError, KeyError, EOFError, struct.error
)  # fmt: skip


# Tuples, whose values a pickle cannot change once they have been checked.
class _Storage(NamedTuple):
    key: str
    dtype: str
    itemsize: int
    count: int


class _View(NamedTuple):
    """A tensor: elements of a storage from ``offset`` on, in the order of its axes."""

    storage: _Storage
    offset: int
    shape: Shape


class _Refused(Exception):
    """The file holds something that is not read here; the text says what."""


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensor name → `Tensor` of one file that `torch.save` wrote from a dict of tensors.

    Raises:
      CheckpointError: the file is missing, damaged, or holds anything but tensors.
    """
    size = file_size(file)
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"] or [None]
            if pickled is None:
                raise _Refused("is a zip archive without a data.pkl, which torch.save writes")
            folder = pickled.removesuffix("data.pkl")
            state = _unpickle(_read_entry(archive, pickled))
            if folder + "byteorder" in archive.namelist() and _read_entry(archive, folder + "byteorder") != b"little":
                raise _Refused("has numbers whose first byte is the most significant one")
            starts: dict[str, int] = {}
            with file.open("rb") as opened:
                for view in state.values():
                    storage = view.storage
                    if storage.key not in starts:
                        entry = archive.getinfo(f"{folder}data/{storage.key}")
                        starts[storage.key] = _start(opened, entry, storage.count * storage.itemsize, size)
    except _Refused as error:
        raise CheckpointError(f"{file}: {error}. {_REMEDY.format(name=file.name, stem=file.stem)}") from None
    except _DAMAGED as error:
        if not _is_zip(file):
            raise CheckpointError(
                f"{file}: not a zip archive, as torch.save has written since PyTorch 1.6; it has {size} bytes. If it "
                f"is not damaged, it is older. {_REMEDY.format(name=file.name, stem=file.stem)}"
            ) from None
        raise CheckpointError(
            f"{file}: not a complete file of torch.save ({error}); it has {size} bytes. {DOWNLOAD_AGAIN}"
        ) from None
    return {
        name: Tensor(
            file,
            view.storage.dtype,
            view.shape,
            starts[view.storage.key] + view.offset * view.storage.itemsize,
            math.prod(view.shape) * view.storage.itemsize,
        )
        for name, view in state.items()
    }


def _is_zip(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a small entry, checked against its checksum."""
    if archive.getinfo(name).file_size > _MAX_PICKLE:
        raise _Refused(f"has an entry {name} of more than {_MAX_PICKLE:,} bytes")
    with archive.open(name) as entry:
        return entry.read()


def _start(opened: io.BufferedReader, entry: zipfile.ZipInfo, needed: int, file_bytes: int) -> int:
    """The byte of the file at which the content of an entry begins."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _Refused("is a zip archive whose entries are compressed, which torch.save never writes")
    opened.seek(entry.header_offset)
    header = opened.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"entry {entry.filename} has no header")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if entry.file_size < needed or start + entry.file_size > file_bytes:
        raise ValueError(f"entry {entry.filename} has {entry.file_size} bytes, its tensors need {needed}")
    return start


def _unpickle(content: bytes) -> dict[str, _View]:
    """Tensor name → where it lies, of a dict of tensors. Raises _Refused, ValueError."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise _Refused(f"holds something else than tensors (a pickle with {opcode.name})")
        # The unpickler makes room for as many memorised objects as this says.
        if opcode.name == "LONG_BINPUT" and argument > len(content):
            raise ValueError(f"it memorises object number {argument}")
    try:
        state = _Unpickler(io.BytesIO(content)).load()
    except (_Refused, ValueError):
        raise
    except Exception as error:  # a pickle out of order makes unpickling raise nearly anything
        raise ValueError(f"its pickle is out of order: {type(error).__name__}: {error}") from None
    if not isinstance(state, dict):
        raise _Refused(f"holds {_kind(state)} alone, expected a dict of tensor names to tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            raise _Refused(f"holds {_kind(value)} under {name!r}, expected tensors alone (a state dict)")
    return dict(state)


def _kind(value: Any) -> str:
    if isinstance(value, _View | dict):
        return "a tensor" if isinstance(value, _View) else "another dict"
    return f"a value of type {type(value).__name__}"


class _Unpickler(pickle.Unpickler):
    """Knows the functions and classes that a state dict's pickle names, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("collections", "OrderedDict"): _StateDict,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
            ("torch", "Size"): tuple,
        }
        if (module, name) not in known:
            raise _Refused(f"holds something else than tensors: its pickle asks for {module}.{name}, which is not run")
        return known[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, (dtype, itemsize), key, _location, count = reference
        if kind != "storage" or not isinstance(key, str) or not _is_size(count):
            raise ValueError(f"its pickle refers to {reference!r}")
        return _Storage(key, dtype, itemsize, count)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


class _StateDict(dict):
    """Instead of an OrderedDict: takes no attributes, of which a state dict's are notes for torch."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _RebuildTensor:
    """``torch._utils._rebuild_tensor_v2``: gradients and hooks have no meaning here."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _View:
        if not isinstance(storage, _Storage) or not all(map(_is_size, (offset, *size, *stride))):
            raise ValueError("its pickle makes a tensor of something else than a storage and sizes")
        in_order, step = True, 1
        for length, elements in zip(reversed(size), reversed(stride), strict=True):
            in_order &= length <= 1 or elements == step
            step *= max(1, length)
        if not in_order and 0 not in size:
            raise _Refused(f"holds a tensor {list(size)} whose elements do not lie in order")
        if offset + math.prod(size) > storage.count:
            raise ValueError(f"a tensor {list(size)} goes beyond its storage of {storage.count} elements")
        return _View(storage, offset, tuple(size))


class _RebuildParameter:
    """``torch._utils._rebuild_parameter``, of its tensor."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data
