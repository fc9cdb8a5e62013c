"""One part on disk: an ordinary Orbax checkpoint, written with Orbax's stable API and readable with it.

Arrays are stored without compression (measured five times faster than zstd) and without OCDBT, in one chunk per expert,
so that a host that needs some of the experts reads exactly their bytes. Reading goes through TensorStore, Orbax's own
storage layer, because Orbax restores whole arrays where no sharding is given.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from .errors import CheckpointError
from .layout import Shape
from .safetensors_file import FileRange
from .tensor_plan import is_expert_leaf


@dataclasses.dataclass(frozen=True)
class FilesArray:
    """An array whose bytes lie in files already."""

    shape: Shape
    dtype: np.dtype
    ranges: Sequence[FileRange]
    """Its bytes, one range after the other."""


class PartWriter:
    """Writes parts; one per thread."""

    def __init__(self) -> None:
        # Nobody else touches the arrays while they are written, so Orbax need not copy them first.
        arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays))
        with _without_expected_warnings():
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, use_compression=False, type_handler_registry=registry
            )
        self._checkpointer = ocp.Checkpointer(handler)

    def write(self, folder: Path, slices: Mapping[str, np.ndarray | FilesArray]) -> None:
        """Save `slices` (path -> values) as the Orbax checkpoint `folder`, nested by the components of the paths.

        Values that lie in files go from there straight into chunks; Orbax saves a placeholder of one element for each,
        and with it everything that makes the folder a checkpoint.
        """
        arrays = {path: _placeholder(s) if isinstance(s, FilesArray) else s for path, s in slices.items()}
        save_args = {path: _save_args(path, array) for path, array in arrays.items()}
        with _without_expected_warnings():
            self._checkpointer.save(
                folder.absolute(), args=ocp.args.PyTreeSave(_nested(arrays), save_args=_nested(save_args))
            )
        for path, values in slices.items():
            if isinstance(values, FilesArray):
                _replace_placeholder(folder / path, values, is_expert_leaf(path))

    def close(self) -> None:
        """Release Orbax's threads."""
        self._checkpointer.close()


def _save_args(path: str, array: np.ndarray) -> ocp.SaveArgs:
    if is_expert_leaf(path) and array.size:
        return ocp.SaveArgs(chunk_byte_size=array.nbytes // len(array), shard_axes=(0,))
    return ocp.SaveArgs()


def _placeholder(values: FilesArray) -> np.ndarray:
    return np.zeros((1,) * len(values.shape), values.dtype)


def _replace_placeholder(folder: Path, values: FilesArray, chunk_per_row: bool) -> None:
    """Give the zarr array in `folder` its true shape and its bytes: a chunk is a file of uncompressed numbers."""
    description = folder / ".zarray"
    metadata = json.loads(description.read_text())
    if any(metadata[key] != value for key, value in _PLAIN_CHUNKS.items()):
        raise RuntimeError(f"Orbax was asked for plain zarr chunks, but wrote {metadata}")
    metadata["shape"] = list(values.shape)
    metadata["chunks"] = [1, *values.shape[1:]] if chunk_per_row else list(values.shape)
    description.write_text(json.dumps(metadata))
    chunk_bytes = math.prod(metadata["chunks"]) * values.dtype.itemsize
    remaining = list(reversed(values.ranges))
    for number in range(values.shape[0] if chunk_per_row else 1):
        with open(folder / ".".join([str(number), *["0"] * (len(values.shape) - 1)]), "wb", buffering=0) as chunk:
            for piece in _take(remaining, chunk_bytes):
                piece.copy_to(chunk.fileno())


def _take(remaining: list[FileRange], nbytes: int) -> Iterator[FileRange]:
    """Take ranges of `nbytes` in all from the end of `remaining`, splitting the last of them where necessary."""
    while nbytes:
        piece = remaining.pop()
        if piece.nbytes > nbytes:
            remaining.append(dataclasses.replace(piece, offset=piece.offset + nbytes, nbytes=piece.nbytes - nbytes))
            piece = dataclasses.replace(piece, nbytes=nbytes)
        nbytes -= piece.nbytes
        yield piece


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


_PLAIN_CHUNKS = {"compressor": None, "filters": None, "order": "C", "dimension_separator": ".", "zarr_format": 2}
"""What makes a chunk a file of nothing but the numbers (zarr format 2)."""

_EXPECTED_WARNINGS = (
    "Skipping merge of OCDBT",
    "Setting the target_byte_size too small",
    "No jax.Array in TypeHandlerRegistry",
)
"""What Orbax warns of whenever OCDBT is off, chunks are small, or only numpy arrays are saved."""


@contextlib.contextmanager
def _without_expected_warnings() -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return not any(warning in record.getMessage() for warning in _EXPECTED_WARNINGS)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def read_part_into(out: np.ndarray, folder: Path, path: str, region: Sequence[slice], shape: Shape) -> None:
    """Fill `out` with `region` of leaf `path` of the part `folder`, where the leaf has this `shape`.

    Raises:
        CheckpointError: Naming part and parameter: files are missing or damaged, or hold another dtype or shape.
    """
    try:
        store = ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(folder.absolute() / path)},
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
        ).result()
        if store.dtype.numpy_dtype != out.dtype or store.shape != tuple(shape):
            raise CheckpointError(
                f"{folder}: {path}: holds {store.dtype.numpy_dtype} {list(store.shape)}, "
                f"expected {out.dtype} {list(shape)}"
            )
        out[...] = store[tuple(region)].read().result()
    except (ValueError, IndexError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: {path}: cannot be read: {error}") from error
