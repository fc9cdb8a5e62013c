"""One part on disk: an ordinary Orbax checkpoint, written with Orbax's stable API and readable with it.

Arrays are stored without compression (measured five times faster than zstd) and without OCDBT. Expert weights are in one
chunk per expert, and the manifest says what else is in several, so that a host that needs some of them reads exactly
their bytes. Reading goes through TensorStore, Orbax's own storage layer, because Orbax restores whole arrays where no
sharding is given.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from .errors import CheckpointError
from .layout import Shape
from .manifest import Chunk
from .safetensors_file import FileRange
from .zarr_files import DESCRIPTION_NAME, is_plain


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
        # A part is written by one process; of a job with several, Orbax would let it wait for the others.
        this = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, ocp.type_handlers.NumpyHandler()))
        with _quiet_orbax():
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False,
                use_compression=False,
                type_handler_registry=registry,
                multiprocessing_options=alone,
            )
        self._checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def write(
        self, folder: Path, slices: Mapping[str, np.ndarray | FilesArray], chunks: Mapping[str, Chunk | None]
    ) -> None:
        """Save `slices` (path -> values) as the Orbax checkpoint `folder`, nested by the components of the paths.

        Orbax saves a placeholder of one element for each, and with it everything that makes the folder a checkpoint. The
        values are then written here: those that lie in files go from there straight into chunks, chunks have the size that
        was asked for, which Orbax would round to what it finds best, and a full disk is an error of one file, not of a
        thread of Orbax.
        """
        arrays = {path: np.zeros((1,) * len(values.shape), values.dtype) for path, values in slices.items()}
        save_args = {path: ocp.SaveArgs() for path in arrays}
        with _quiet_orbax():
            self._checkpointer.save(
                folder.absolute(), args=ocp.args.PyTreeSave(_nested(arrays), save_args=_nested(save_args))
            )
        for path, values in slices.items():
            _replace_placeholder(folder / path, values, chunks[path])

    def close(self) -> None:
        """Release Orbax's threads."""
        self._checkpointer.close()


def _replace_placeholder(folder: Path, values: np.ndarray | FilesArray, chunk: Chunk | None) -> None:
    """Give the zarr array in `folder` its true shape and its bytes: a chunk is a file of uncompressed numbers."""
    description = folder / DESCRIPTION_NAME
    metadata = json.loads(description.read_text())
    if not is_plain(metadata):
        raise RuntimeError(f"Orbax was asked for plain zarr chunks, but wrote {metadata}")
    chunk = Chunk(axis=0, length=values.shape[0]) if chunk is None else chunk
    chunk_shape = [*values.shape[: chunk.axis], chunk.length, *values.shape[chunk.axis + 1 :]]
    metadata["shape"], metadata["chunks"] = list(values.shape), chunk_shape
    description.write_text(json.dumps(metadata))
    remaining = list(reversed(values.ranges)) if isinstance(values, FilesArray) else []
    for number in range(values.shape[chunk.axis] // chunk.length):
        position = ["0"] * len(values.shape)
        position[chunk.axis] = str(number)
        with open(folder / ".".join(position), "wb", buffering=0) as file:
            if isinstance(values, FilesArray):
                for piece in _take(remaining, math.prod(chunk_shape) * values.dtype.itemsize):
                    piece.copy_to(file.fileno())
            else:
                window = slice(number * chunk.length, (number + 1) * chunk.length)
                part = np.ascontiguousarray(values[(slice(None),) * chunk.axis + (window,)])
                data = memoryview(part.reshape(-1).view(np.uint8))
                while data:
                    data = data[file.write(data) :]


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


_EXPECTED_WARNINGS = (
    "Skipping merge of OCDBT",
    "Setting the target_byte_size too small",
    "No jax.Array in TypeHandlerRegistry",
)
"""What Orbax warns of whenever OCDBT is off, chunks are small, or only numpy arrays are saved."""


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Without the warnings that are expected, and without the tracebacks that its threads log of what is raised here, too."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.exc_info and not any(warning in record.getMessage() for warning in _EXPECTED_WARNINGS)

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
