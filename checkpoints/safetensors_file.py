"""One safetensors file: its header, checked in full, and reads of consecutive rows of a tensor.

Format: 8 bytes little-endian header length N, N bytes of JSON (name -> dtype, shape, data_offsets), then the data.
Data is read with `pread` into buffers of the caller, never mapped: mapped pages would count as resident memory.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.json_types import NATURAL

from .dtypes import SAFETENSORS_DTYPES
from .errors import CheckpointError
from .layout import Shape

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""


@dataclasses.dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file."""

    file: Path
    offset: int
    nbytes: int
    what: str
    """What they are, for messages."""

    def copy_to(self, descriptor: int) -> None:
        """Append the bytes to an open file, inside the kernel where the file systems can.

        Raises:
            CheckpointError: The file ends early or cannot be read.
            OSError: The bytes cannot be written.
        """
        try:
            source = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot read {self.what}: {error.strerror}") from error
        try:
            done = 0
            while done < self.nbytes:
                count = self._copy_some(source, descriptor, done)
                if count == 0:
                    raise CheckpointError(f"{self.file}: ends inside {self.what}, at byte {self.offset + done}")
                done += count
        finally:
            os.close(source)

    def _copy_some(self, source: int, target: int, done: int) -> int:
        """Append some of what follows the first `done` bytes to `target`; how many, 0 at the end of the file."""
        count, offset = self.nbytes - done, self.offset + done
        if hasattr(os, "copy_file_range"):
            # Between many pairs of file systems it fails, and in some it says 0, "the end", in the middle of a file. What is
            # really wrong, if anything is, comes out below.
            with contextlib.suppress(OSError):
                if copied := os.copy_file_range(source, target, count, offset_src=offset):
                    return copied
        try:
            data = memoryview(os.pread(source, min(count, _COPY_BYTES), offset))
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot read {self.what}: {error.strerror}") from error
        written = 0
        while written < len(data):
            written += os.write(target, data[written:])
        return len(data)


_COPY_BYTES = 1 << 22
_COMPARED_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where and what one tensor is."""

    name: str
    file: Path
    dtype: np.dtype
    shape: Shape
    offset: int
    """Of its first byte, from the start of the file."""

    @property
    def row_shape(self) -> Shape:
        """Shape of one step along the first axis."""
        return self.shape[1:]

    @property
    def num_rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.num_rows * self.row_bytes

    def range_of(self, rows: range) -> FileRange:
        """Where the bytes of consecutive `rows` are."""
        return FileRange(self.file, self.offset + rows.start * self.row_bytes, len(rows) * self.row_bytes, self.name)

    def read_into(self, rows: np.ndarray, start: int = 0) -> None:
        """Fill the C-contiguous `rows` with the rows that begin at `start`.

        Raises:
            CheckpointError: The file ends early or cannot be read.
        """
        pread(self.file, memoryview(rows.reshape(-1).view(np.uint8)), self.offset + start * self.row_bytes, self.name)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows from `start` up to `stop`, as stored."""
        stop = self.num_rows if stop is None else stop
        rows = np.empty((stop - start, *self.row_shape) if self.shape else (), self.dtype)
        self.read_into(rows, start)
        return rows

    def has_bytes_of(self, other: "TensorEntry") -> bool:
        """Whether dtype, shape and bytes are the same; CheckpointError when a file cannot be read."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        step = max(1, _COMPARED_BYTES // max(self.row_bytes, 1))
        pieces = ((start, min(start + step, self.num_rows)) for start in range(0, self.num_rows, step))
        return all(self.read(*piece).tobytes() == other.read(*piece).tobytes() for piece in pieces)


def pread(file: Path, buffer: memoryview, offset: int, what: str) -> None:
    """Fill `buffer` from `offset` of `file`; CheckpointError naming the file and `what` when that is impossible."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{file}: ends inside {what}, at byte {offset + done}")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read {what}: {error.strerror}") from error


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """Every tensor of `file`, in the order of the data.

    Raises:
        CheckpointError: The header is truncated, isn't valid JSON, names a tensor twice, or doesn't describe the file's
            bytes exactly (wrong sizes, overlaps, holes, bytes missing or left over). The message names file and tensor.
    """
    header_bytes, size = read_header_bytes(file)
    try:
        header = json.loads(header_bytes.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # the latter of brackets nested too deeply
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from error
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{file}: the header names {error.key!r} twice") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    return parse_header(file, header, len(header_bytes), size)


def parse_header(
    file: Path, header: Mapping[str, Any], header_bytes: int = 0, size: int | None = None
) -> tuple[TensorEntry, ...]:
    """Every tensor that the header of `file` describes, in the order of the data.

    Args:
        file: Where the header is from.
        header: Tensor name -> dtype, shape, data_offsets.
        header_bytes: Length of the header's text; without it, the entries don't say where in the file they are.
        size: Size of the file, if it is known.

    Raises:
        CheckpointError: As `read_header`.
    """
    data_start = 8 + header_bytes
    entries = [
        _entry(file, name, description, data_start) for name, description in header.items() if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.offset + entry.nbytes))
    _check_contiguous(file, entries, data_start, size)
    return tuple(entries)


def read_header_bytes(file: Path) -> tuple[bytes, int]:
    """The header's JSON text and the file's size; CheckpointError when the file is too short for what it says."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: not a safetensors file: {size} bytes, shorter than the length field")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: not a safetensors file: says its header has {length} bytes, "
                    f"the limit is {MAX_HEADER_BYTES}"
                )
            if length > size - 8:
                raise CheckpointError(f"{file}: truncated: says its header has {length} bytes, the file has {size}")
            return stream.read(length), size
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _entry(file: Path, name: str, description: Any, data_start: int) -> TensorEntry:
    """The entry that the header describes; its sizes agree with each other, not yet with the file."""
    if not isinstance(description, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(description):
        raise CheckpointError(
            f"{file}: {name}: the header must give dtype, shape and data_offsets, got {description!r}"
        )
    dtype = SAFETENSORS_DTYPES.get(description["dtype"]) if isinstance(description["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: {name}: unknown dtype {description['dtype']!r}; known: {', '.join(SAFETENSORS_DTYPES)}"
        )
    shape, offsets = description["shape"], description["data_offsets"]
    if not isinstance(shape, list) or not all(map(NATURAL.accepts, shape)):
        raise CheckpointError(f"{file}: {name}: shape must be a list of sizes, got {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(NATURAL.accepts, offsets)):
        raise CheckpointError(f"{file}: {name}: data_offsets must be two positions, got {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file}: {name}: shape {shape} of {description['dtype']} needs {math.prod(shape) * dtype.itemsize} bytes, "
            f"data_offsets {offsets} give {end - begin}"
        )
    return TensorEntry(name=name, file=file, dtype=dtype, shape=tuple(shape), offset=data_start + begin)


def _check_contiguous(file: Path, entries: list[TensorEntry], data_start: int, size: int | None) -> None:
    position = data_start
    for entry in entries:
        if entry.offset < position:
            raise CheckpointError(f"{file}: {entry.name}: its bytes overlap those of another tensor")
        if size is not None and entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{file}: truncated: {entry.name} ends at byte {entry.offset + entry.nbytes}, the file has {size}"
            )
        if entry.offset > position:
            raise CheckpointError(
                f"{file}: {entry.name}: {entry.offset - position} bytes before it belong to no tensor"
            )
        position += entry.nbytes
    if size is not None and position != size:
        raise CheckpointError(f"{file}: {size - position} bytes at the end belong to no tensor")
