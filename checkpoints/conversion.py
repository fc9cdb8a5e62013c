"""`convert`: a Hugging Face folder, streamed into a converted folder part by part; interrupted, it can go on.

The life of an output folder:

1. `OUT.incomplete/` is created, with `conversion.json`: the future manifest, and so the identity of this conversion.
2. Each part is written by Orbax in `OUT.incomplete/pending/`, forced to the disk, then renamed into `parts/`.
3. The small files are copied, `conversion.json` is renamed to `moe_jax.json`, and `OUT.incomplete` to `OUT`.

A kill between any two steps leaves either the same state or the next one. Values that need no conversion go from file to
file inside the kernel. The others are read while parts before them are being written, and are bounded in bytes.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import Checkpoint
from .checkpoint_json import read_checkpoint_json
from .dtypes import MAIN_PARAMETER, naming_dtype, weight_dtype
from .errors import CheckpointError
from .file_names import MANIFEST_NAME, PARTS_FOLDER
from .hub import resolve_source
from .manifest import Chunk, Manifest, plan_conversion
from .opening import open_checkpoint
from .parts import Part, Slice
from .progress import Progress, ProgressCallback
from .side_files import copy_side_files
from .staging import (
    check_output,
    check_space,
    check_unfinished_work,
    clear,
    commit,
    exclusive,
    incomplete_folder,
    output_folder,
    sync,
    sync_tree,
    write_errors,
    write_file,
)

if TYPE_CHECKING:
    from .orbax_part import FilesArray, PartWriter

PLAN_NAME = "conversion.json"
PENDING_FOLDER = "pending"
DEFAULT_PART_BYTES = 256 << 20
"""Large enough that a part's fixed costs vanish, small enough that a few of them are little memory."""

_WRITERS = 4
_PARTS_IN_FLIGHT = 6
_MEMORY_BYTES = 3 * DEFAULT_PART_BYTES
"""Values held in memory, at most, unless those of one part are more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` did."""

    output: Path
    family: str
    form: str
    """Form of the source."""
    quantization: str | None
    """Method by which the source was quantized, if it was; the output holds ordinary numbers."""
    dtype_bytes: Mapping[str, int]
    """Dtype -> bytes in the output."""
    arrays: int
    """Parameters written, each an array."""
    parts: int
    """Parts of the output."""
    parts_resumed: int
    """Parts that an interrupted run had left finished."""
    nbytes: int
    """Bytes of all parameters in the output."""
    dropped: Mapping[str, str]
    """Tensors of the source left out on purpose -> why."""
    seconds: float


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: Any = None,
    shards: int = 1,
    overwrite: bool = False,
    revision: str | None = None,
    part_bytes: int = DEFAULT_PART_BYTES,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Convert a checkpoint; call it again after an interruption and it goes on where it was.

    Args:
        source: A Hugging Face folder, the id of a model on its hub, or a converted folder.
        output: The folder to create.
        dtype: Dtype of the parameters (bfloat16, float16, float32), except those that must stay float32; None: the
            source's.
        shards: How many devices will split the model. Parts of experts then end where a device's share ends, and what
            devices split by heads, features or vocabulary is stored in as many chunks, so that every host reads exactly
            its share. Any other number of devices can load it too, but hosts may have to read more.
        overwrite: Replace `output` if it exists, and discard what an interrupted conversion with another source or
            other options has left.
        revision: Branch, tag or commit of a model on the hub; None: its newest.
        part_bytes: Size of a part, at most, unless a single expert's weights are larger.
        progress: Called with `Progress(done_bytes, total_bytes, label)` after each part.

    Returns:
        What was converted, and which tensors were left out on purpose.

    Raises:
        CheckpointError: `dtype` is none that parameters may have, `shards` or `part_bytes` isn't positive, the source
            isn't whole (every problem is listed, nothing is written), the output exists or holds the source, there is no
            space left, an interrupted conversion of something else is in the way, or a value is beyond the range of
            `dtype`.
    """
    # Before anything is downloaded:
    _check_options(dtype, shards, part_bytes)
    check_output(output_folder(output), overwrite, source)
    return write_converted(
        open_checkpoint(resolve_source(source, revision)),
        output,
        dtype=dtype,
        shards=shards,
        overwrite=overwrite,
        part_bytes=part_bytes,
        progress=progress,
    )


def write_converted(
    reader: Checkpoint,
    output: str | os.PathLike[str],
    *,
    dtype: Any = None,
    shards: int = 1,
    overwrite: bool = False,
    part_bytes: int = DEFAULT_PART_BYTES,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Write any checkpoint as a converted folder; arguments and errors are those of `convert`.

    A reader without a digest (a model in memory) is always written from the beginning. `progress` is called for the first
    time when everything is ready to be written, before any value is read.
    """
    started = time.monotonic()
    asked = _check_options(dtype, shards, part_bytes)
    output = output_folder(output)
    check_output(output, overwrite, reader.folder)
    manifest = plan_conversion(reader, asked, part_bytes, shards)
    work = incomplete_folder(output)
    with write_errors(work), exclusive(work):
        _prepare(work, manifest, overwrite)
        done = _finished_parts(work, manifest)
        missing = [part for part in manifest.parts if part.name not in done]
        check_space(work, sum(map(manifest.part_bytes, missing)))
        _write_parts(reader, work, manifest, missing, progress)
        copy_side_files(reader, work, naming_dtype(reader.config, manifest.leaves[MAIN_PARAMETER].dtype))
        check_output(output, overwrite, reader.folder)  # again: what has come there meanwhile is somebody's
        _finish(work, output)
    dtype_bytes: dict[str, int] = {}
    for leaf in manifest.leaves.values():
        dtype_bytes[leaf.dtype.name] = dtype_bytes.get(leaf.dtype.name, 0) + leaf.nbytes
    return ConversionReport(
        output=output,
        family=manifest.family,
        form=manifest.form,
        quantization=manifest.quantization,
        dtype_bytes=dtype_bytes,
        arrays=len(manifest.leaves),
        parts=len(manifest.parts),
        parts_resumed=len(done),
        nbytes=manifest.nbytes,
        dropped=manifest.dropped,
        seconds=time.monotonic() - started,
    )


def _check_options(dtype: Any, shards: int, part_bytes: int) -> np.dtype | None:
    """The dtype that is asked for; CheckpointError for an option that is illegal whatever the source is."""
    if shards < 1:
        raise CheckpointError(f"shards must be positive, got {shards}")
    if part_bytes < 1:
        raise CheckpointError(f"part_bytes must be positive, got {part_bytes}")
    return None if dtype is None else weight_dtype(dtype)


def read_as_written(reader: Checkpoint, done: int = 0) -> None:
    """Read everything as `write_converted(reader, ...)` does, in the same order, and drop it.

    Where reading takes several processes, because their devices hold the values together, one writes and the others do
    this. If writing fails after `done` slices were read, the one that writes does this with the rest of them.
    """
    manifest = plan_conversion(reader, None, DEFAULT_PART_BYTES)
    slices = (s for part in manifest.parts for s in _divide(reader, manifest, part)[1])
    for s in itertools.islice(slices, done, None):
        reader.read_slice(s.path, s.start, s.stop, manifest.leaves[s.path].dtype)


def _check_unfinished(work: Path, digest: str | None, overwrite: bool) -> None:
    """Raise CheckpointError unless what `work` holds may be discarded for a conversion with this digest.

    An interrupted conversion is somebody's to go on with. A model that was being saved from memory cannot be gone on
    with, so that saving one again discards it.
    """
    found = _find_plan(work)
    may_discard = overwrite or (digest is None and found is not None and _digest_in(found) is None)
    check_unfinished_work(work, PLAN_NAME, found is not None, may_discard)


def _find_plan(work: Path) -> Path | None:
    """What says which conversion `work` belongs to. Only the very last rename may be missing: then it is the manifest."""
    return next((work / name for name in (PLAN_NAME, MANIFEST_NAME) if (work / name).exists()), None)


def _digest_in(plan: Path) -> str | None:
    return Manifest.from_json(read_checkpoint_json(plan), plan).digest


def _prepare(work: Path, manifest: Manifest, overwrite: bool) -> None:
    """Make `work` a folder of this conversion, keeping what an earlier run of the same one has left."""
    plan = manifest.to_json()
    found = _find_plan(work)
    if found is not None and manifest.digest is not None and found.read_text(encoding="utf-8") == plan:
        os.replace(found, work / PLAN_NAME)
        shutil.rmtree(work / PENDING_FOLDER, ignore_errors=True)
    else:
        _check_unfinished(work, manifest.digest, overwrite)
        clear(work, last=found)
        write_file(work / PLAN_NAME, plan)
    (work / PARTS_FOLDER).mkdir(exist_ok=True)
    (work / PENDING_FOLDER).mkdir()


def _finished_parts(work: Path, manifest: Manifest) -> set[str]:
    return {entry.name for entry in (work / PARTS_FOLDER).iterdir()} & {part.name for part in manifest.parts}


def _write_parts(
    reader: Checkpoint, work: Path, manifest: Manifest, missing: list[Part], progress: ProgressCallback | None
) -> None:
    """Read parts one after the other while those before them are being written."""
    from .orbax_part import PartWriter

    total = manifest.nbytes
    done = total - sum(map(manifest.part_bytes, missing))
    if progress is not None:
        progress(Progress(done_bytes=done, total_bytes=total, label="start"))
    in_flight: dict[Future[None], tuple[Part, int]] = {}

    def settle(parts: int, memory: int) -> None:
        """Wait until no more than so many parts, with no more than `memory` bytes of values, are to be written."""
        nonlocal done
        while len(in_flight) > parts or (in_flight and sum(held for _, held in in_flight.values()) > memory):
            finished, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in finished:
                part, _ = in_flight.pop(future)
                future.result()
                done += manifest.part_bytes(part)
                if progress is not None:
                    progress(Progress(done_bytes=done, total_bytes=total, label=part.name))

    with contextlib.ExitStack() as stack:
        writers: SimpleQueue[PartWriter] = SimpleQueue()
        for _ in range(_WRITERS):
            writers.put(stack.enter_context(contextlib.closing(PartWriter())))
        pool = ThreadPoolExecutor(_WRITERS)
        stack.callback(pool.shutdown, cancel_futures=True)
        for part in missing:
            slices, computed = _divide(reader, manifest, part)
            held = sum((s.stop - s.start) * manifest.leaves[s.path].slice_bytes for s in computed)
            # Beside values that fill the memory by themselves, because one expert is huge, no others may be held.
            settle(_PARTS_IN_FLIGHT - 1, max(0, _MEMORY_BYTES - held))
            for s in computed:
                slices[s.path] = reader.read_slice(s.path, s.start, s.stop, manifest.leaves[s.path].dtype)
            chunks = {s.path: manifest.chunk_of(s) for s in part.slices}
            in_flight[pool.submit(_write_part, writers, work, part.name, slices, chunks)] = (part, held)
            del slices
        settle(0, 0)


def _divide(
    reader: Checkpoint, manifest: Manifest, part: Part
) -> tuple[dict[str, "np.ndarray | FilesArray"], list[Slice]]:
    """Of the slices of a part: those whose bytes can be copied from file to file, and those that must be read."""
    from .orbax_part import FilesArray

    copied: dict[str, np.ndarray | FilesArray] = {}
    computed: list[Slice] = []
    for s in part.slices:
        leaf = manifest.leaves[s.path]
        chunk = manifest.chunk_of(s)
        in_order = chunk is None or chunk.axis == 0  # one chunk's bytes lie after the other's
        ranges = reader.file_ranges(s.path, s.start, s.stop, leaf.dtype) if in_order else None
        if ranges is None:
            computed.append(s)
        else:
            copied[s.path] = FilesArray(leaf.slice_shape(s.start, s.stop), leaf.dtype, ranges)
    return copied, computed


def _write_part(
    writers: "SimpleQueue[PartWriter]",
    work: Path,
    name: str,
    slices: Mapping[str, "np.ndarray | FilesArray"],
    chunks: Mapping[str, Chunk | None],
) -> None:
    pending = work / PENDING_FOLDER / name
    writer = writers.get()
    try:
        writer.write(pending, slices, chunks)
        sync_tree(pending)
        os.rename(pending, work / PARTS_FOLDER / name)
        sync(work / PARTS_FOLDER)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{pending}: could not be written: {error}. The finished parts are kept: "
            "when the cause is removed (is there space left?), the same conversion goes on from them"
        ) from error
    finally:
        writers.put(writer)


def _finish(work: Path, output: Path) -> None:
    """Everything is there: make it look so, at once."""
    shutil.rmtree(work / PENDING_FOLDER)
    for entry in work.iterdir():
        if entry.is_file():
            sync(entry)  # the parts are on the disk already
    sync(work)
    os.replace(work / PLAN_NAME, work / MANIFEST_NAME)
    sync(work)
    commit(work, output)
