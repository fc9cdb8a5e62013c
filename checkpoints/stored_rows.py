"""The rows of a stored tensor as numbers, however they are encoded in the checkpoint."""

import dataclasses
from typing import Protocol

import ml_dtypes
import numpy as np

from .block_fp8 import decode_block_fp8, scale_values
from .casting import all_finite, check_range, may_overflow
from .layout import Shape
from .mxfp4 import decode_mxfp4
from .safetensors_file import TensorEntry

_CAST_BYTES = 1 << 22


class StoredRows(Protocol):
    """A tensor whose first axis can be read piece by piece."""

    @property
    def entry(self) -> TensorEntry:
        """The tensor of the file that holds the numbers; of decoded ones, without their scales."""
        ...

    @property
    def dtype(self) -> np.dtype | None:
        """Dtype of the numbers; None when they have no dtype of their own, because they are decoded."""
        ...

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill the C-contiguous `out` with the rows that begin at `start`, in the dtype of `out`."""
        ...


def read_in_range(rows: StoredRows, out: np.ndarray, start: int) -> None:
    """`rows.read_into(out, start)`; CheckpointError if the dtype of `out` is too narrow for one of the numbers."""
    rows.read_into(out, start)
    if not may_overflow(rows.dtype or np.dtype(np.float32), out.dtype) or all_finite(out):
        return
    step = max(1, _CAST_BYTES // max(out[:1].nbytes, 1))
    for begin in range(0, len(out), step):
        exact = np.empty(out[begin : begin + step].shape, np.float32)
        rows.read_into(exact, start + begin)
        check_range(exact, out[begin : begin + step], f"{rows.entry.file}: {rows.entry.name}")


@dataclasses.dataclass(frozen=True)
class PlainRows:
    """Numbers stored as they are."""

    entry: TensorEntry

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the file."""
        return self.entry.dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Read in place, or piecewise through a small buffer when the dtype changes."""
        if out.dtype == self.entry.dtype:
            self.entry.read_into(out, start)
            return
        out = out.reshape(-1, *self.entry.row_shape)
        step = max(1, _CAST_BYTES // max(self.entry.row_bytes, 1))
        for begin in range(0, len(out), step):
            rows = np.empty(out[begin : begin + step].shape, self.entry.dtype)
            self.entry.read_into(rows, start + begin)
            with np.errstate(over="ignore"):
                out[begin : begin + step] = rows


@dataclasses.dataclass(frozen=True)
class BlockFP8Rows:
    """`[N, K]` or `[E, N, K]` float8 with multipliers per block of the last two axes."""

    weights: TensorEntry
    scales: TensorEntry
    block: tuple[int, int]

    dtype = None

    @property
    def entry(self) -> TensorEntry:
        """The float8 numbers."""
        return self.weights

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Read and decode the rows, of which a 3-D tensor's are whole matrices."""
        if len(self.weights.shape) == 2:
            grid = scale_values(self.scales.read())
            decode_block_fp8(self._bytes(start, len(out)), grid.reshape(-1, _columns(grid)), self.block, out, start)
            return
        for offset, matrix in enumerate(out):
            grid = scale_values(self.scales.read(start + offset, start + offset + 1))
            weights = self._bytes(start + offset, 1)[0]
            decode_block_fp8(weights, grid.reshape(-1, _columns(grid)), self.block, matrix)

    def _bytes(self, start: int, count: int) -> np.ndarray:
        return self.weights.read(start, start + count).view(np.uint8)


def _columns(grid: np.ndarray) -> int:
    return grid.shape[-1] if grid.ndim else 1


@dataclasses.dataclass(frozen=True)
class MXFP4Rows:
    """`[E, N, K]` packed as blocks `[E, N, K / 32, 16]` and scales `[E, N, K / 32]`, both uint8."""

    blocks: TensorEntry
    scales: TensorEntry

    dtype = None

    @property
    def entry(self) -> TensorEntry:
        """The blocks."""
        return self.blocks

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Read and decode one expert after the other."""
        for offset, matrix in enumerate(out):
            expert = start + offset
            decode_mxfp4(self.blocks.read(expert, expert + 1)[0], self.scales.read(expert, expert + 1)[0], matrix)


FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_DTYPES = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu, np.uint8))
"""Dtypes that the multipliers of block FP8 may have."""


def block_grid(shape: Shape, block: tuple[int, int]) -> Shape:
    """Shape of the multipliers of weights of this `shape`."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))
