"""Weights that others have quantized, as they lie in files, and the numbers that they stand for.

A quantized weight [out, in] is several tensors: its values in few bits, and what turns them into numbers. Both classes
below stand among a checkpoint's tensors in the place of a `Tensor`, and decode some rows at a time.

Tested in tests/checkpoint/test_quantized_source.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from dsvl2_jax.checkpoint.rules import FLOAT_DTYPES, Shape
from dsvl2_jax.checkpoint.safetensors_file import Tensor

# Fills a contiguous array from a byte of a tensor on.
Read = Callable[[Tensor, int, np.ndarray], None]

# The number that each byte of a float8 stands for, by the dtype's name in safetensors.
FLOAT8 = {
    "F8_E4M3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "F8_E5M2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32),
}
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "U8": np.uint8,
          "I32": np.int32, "I64": np.int64}  # fmt: skip


def elements(tensor: Tensor, read: Read, start: int, count: int) -> np.ndarray:
    """Some elements of a tensor as it is stored, flat, from number ``start`` on."""
    out = np.empty(count, _NUMPY[tensor.dtype])
    read(tensor, start * out.itemsize, out)
    return out


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A weight of which blocks share a scale: (value − zero point) · scale.

    Attributes:
      dtype: as what it is read, of `FLOAT_DTYPES`. shape: of the weight, [out, in].
      values: float8 or int8 of that shape; or packed, I32 [out, in · bits / 32], the first value of a word in its
        lowest bits, each with half of the range added.
      bits: of a value.
      scale: a float for each block, ordered as the blocks are.
      block: (rows, columns) of a block. The last ones may be cut off.
      divisor: of the scale.
      zero_point: int8, as many as scales; or packed like the values, but along rows; None: 0.
    """

    dtype: str
    shape: Shape
    values: Tensor
    bits: int
    scale: Tensor
    block: tuple[int, int]
    divisor: int = 1
    zero_point: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes in the files."""
        return self.values.size + self.scale.size + (self.zero_point.size if self.zero_point else 0)

    @property
    def stored_as(self) -> str:
        return "float8" if self.values.dtype in FLOAT8 else f"int{self.bits}"

    @property
    def described(self) -> str:
        """For people."""
        rows, columns = self.block
        if self.block == self.shape:
            return f"{self.stored_as} with one scale"
        if rows == 1:
            if columns == self.shape[1]:
                return f"{self.stored_as} with a scale for each output"
            return f"{self.stored_as} with a scale for each {columns} inputs of an output"
        return f"{self.stored_as} with a scale for each block of {rows} × {columns}"

    def rows(self, first: int, count: int, read: Read) -> np.ndarray:
        """f32[count, in]: the rows from ``first`` on."""
        decoded = self._values(first, count, read)
        of_rows, columns = self.block
        across = -(-self.shape[1] // columns)
        begin, end = first // of_rows, -(-(first + count) // of_rows)

        def spread(of_blocks: np.ndarray) -> np.ndarray:  # [blocks, across] → [count, across]
            return np.repeat(of_blocks, of_rows, axis=0)[first - begin * of_rows :][:count]

        if self.zero_point is not None:
            if self.zero_point.dtype == "I32":
                zeros = self._packed_rows(self.zero_point, first, count, across, read)
            else:
                stored = elements(self.zero_point, read, begin * across, (end - begin) * across)
                zeros = spread(stored.reshape(-1, across)).astype(np.float32)
            _by_columns(np.subtract, decoded, zeros, columns)
        scales = elements(self.scale, read, begin * across, (end - begin) * across).astype(np.float32) / self.divisor
        _by_columns(np.multiply, decoded, spread(scales.reshape(-1, across)), columns)
        return decoded

    def _values(self, first: int, count: int, read: Read) -> np.ndarray:
        width = self.shape[1]
        if self.values.dtype in FLOAT8:
            codes = np.empty((count, width), np.uint8)
            read(self.values, first * width, codes)
            return FLOAT8[self.values.dtype][codes]
        if self.values.dtype == "I8":
            return elements(self.values, read, first * width, count * width).reshape(count, width).astype(np.float32)
        words = self.values.shape[1]
        packed = elements(self.values, read, first * words, count * words).view(np.uint32)
        return _unpacked(packed.reshape(count, words, 1), self.bits).reshape(count, -1)[:, :width]

    def _packed_rows(self, tensor: Tensor, first: int, count: int, width: int, read: Read) -> np.ndarray:
        """f32[count, width] of a tensor whose words hold several rows."""
        per_word = 32 // self.bits
        begin, end = first // per_word, -(-(first + count) // per_word)
        packed = elements(tensor, read, begin * width, (end - begin) * width).view(np.uint32)
        unpacked = _unpacked(packed.reshape(end - begin, width, 1), self.bits).swapaxes(1, 2).reshape(-1, width)
        return unpacked[first - begin * per_word :][:count]


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """u32[…, 1] → f32[…, 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words >> shifts) & ((1 << bits) - 1)).astype(np.float32) - (1 << (bits - 1))


def _by_columns(operation: np.ufunc, x: np.ndarray, per_block: np.ndarray, columns: int) -> None:
    """x[:, j] = operation(x[:, j], per_block[:, j // columns]), in place."""
    whole = x.shape[1] // columns
    blocks = x[:, : whole * columns].reshape(len(x), whole, columns)  # a view: one axis is split
    operation(blocks, per_block[:, :whole, None], out=blocks)
    rest = x[:, whole * columns :]
    operation(rest, per_block[:, whole:], out=rest)


@dataclasses.dataclass(frozen=True)
class LookupTensor:
    """A weight in bitsandbytes' 4 bits (nf4, fp4): numbers of a table of 16, times the largest of their block.

    The elements lie flat: two to a byte, the first in its high bits, and a block may end within a row.

    Attributes:
      dtype, shape: as `ScaledTensor`.
      kind: "nf4" or "fp4". table: its 16 numbers.
      values: of any dtype; its bytes count.
      absmax: F32, one for each ``block`` elements; with ``nested`` bytes, of a table of 256.
      nested: (that table, F32 factors for each so many of them, their block, what is added), or None.
    """

    dtype: str
    shape: Shape
    kind: str
    table: tuple[float, ...]
    values: Tensor
    absmax: Tensor
    block: int
    nested: tuple[tuple[float, ...], Tensor, int, float] | None = None

    @property
    def size(self) -> int:
        """Bytes in the files."""
        return self.values.size + self.absmax.size + (self.nested[1].size if self.nested else 0)

    @property
    def stored_as(self) -> str:
        return self.kind

    @property
    def described(self) -> str:
        """For people."""
        return f"{self.kind} with a scale for each {self.block}"

    def rows(self, first: int, count: int, read: Read) -> np.ndarray:
        """f32[count, in]: the rows from ``first`` on."""
        width = self.shape[1]
        begin, end = first * width, (first + count) * width
        packed = np.empty((end + 1) // 2 - begin // 2, np.uint8)
        read(self.values, begin // 2, packed)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[begin % 2 :][: end - begin]
        decoded = np.asarray(self.table, np.float32)[codes]
        first_block = begin // self.block
        largest = self._absmax(first_block, -(-end // self.block), read)
        decoded *= np.repeat(largest, self.block)[begin - first_block * self.block :][: end - begin]
        return decoded.reshape(count, width)

    def _absmax(self, begin: int, end: int, read: Read) -> np.ndarray:
        stored = elements(self.absmax, read, begin, end - begin)
        if self.nested is None:
            return stored.astype(np.float32)
        table, factors, block, offset = self.nested
        first = begin // block
        factor = elements(factors, read, first, -(-end // block) - first).astype(np.float32)
        spread = np.repeat(factor, block)[begin - first * block :][: end - begin]
        return np.asarray(table, np.float32)[stored] * spread + np.float32(offset)


QuantizedTensor = ScaledTensor | LookupTensor


def stored_as(tensor: Tensor | QuantizedTensor) -> str:
    """The name of the numbers that a tensor is stored in, as numpy spells it or as people do."""
    return tensor.stored_as if isinstance(tensor, QuantizedTensor) else FLOAT_DTYPES.get(tensor.dtype, tensor.dtype)
