"""`export`: any checkpoint back to a Hugging Face folder, with their names, layouts and shards.

Every tensor's place in its file is fixed before a byte is written, so parameters are read slice by slice, in whatever
order they are stored, and each slice is written to where it belongs.

The life of an output folder:

1. `OUT.incomplete/` is created, with `export.json`, which identifies this export.
2. `OUT.incomplete/model.incomplete/` is filled, forced to the disk, and renamed to `OUT.incomplete/model`.
3. That is renamed to `OUT`, and `OUT.incomplete` removed.

After a kill before the second rename an export begins anew; after it, only the last step is left.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.families.names import CheckpointForm

from .checkpoint import Checkpoint, target_dtype
from .dtypes import MAIN_PARAMETER, SAFETENSORS_NAMES, naming_dtype, weight_dtype
from .errors import CheckpointError
from .file_names import INDEX_NAME, SINGLE_NAME
from .hub import resolve_source
from .opening import open_checkpoint
from .parts import plan_parts, sizes_of
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
    remove,
    sync,
    sync_tree,
    write_errors,
    write_file,
)
from .tensor_plan import StoredTensor, TensorPlan, check_form, plan_tensors

DEFAULT_SHARD_BYTES = 5_000_000_000
"""What the Hugging Face libraries use."""

_SLICE_BYTES = 256 << 20
_PLAN_NAME = "export.json"
_FINISHED = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export` did."""

    output: Path
    family: str
    form: str
    """Form that was written."""
    tensors: int
    files: tuple[str, ...]
    """Names of the safetensors files."""
    nbytes: int
    """Bytes of all tensors."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor goes."""

    file: str
    offset: int


def export(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    form: CheckpointForm | None = None,
    dtype: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
) -> ExportReport:
    """Write a checkpoint as a Hugging Face folder that `transformers` loads.

    Args:
        source: A converted folder, a Hugging Face folder, the id of a model on its hub, or an open checkpoint.
        output: The folder to create.
        form: "per_expert" or "fused"; None: the form that the checkpoint came in.
        dtype: Convert to this dtype; None: as stored.
        max_shard_bytes: Size of a safetensors file, at most, unless one tensor is larger.
        overwrite: Replace `output` if it exists, and discard an interrupted export from another source or with other
            options that only had to be renamed.
        revision: Branch, tag or commit of a model on the hub; None: its newest.
        progress: Called with `Progress(done_bytes, total_bytes, label)` after each slice.

    Raises:
        CheckpointError: `form` is unknown, `dtype` is none that parameters may have, `max_shard_bytes` isn't positive, the
            source isn't whole, the family has no such form, the output exists or holds the source, there is no space left,
            or a value is beyond the range of `dtype`.
    """
    started = time.monotonic()
    if form is not None:
        check_form(form)
    asked = None if dtype is None else weight_dtype(dtype)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    output = output_folder(output)
    if isinstance(source, str | os.PathLike):
        check_output(output, overwrite, source)  # before anything is downloaded
        reader = open_checkpoint(resolve_source(source, revision))
    else:
        reader = source
    check_output(output, overwrite, reader.folder)
    plan = plan_tensors(reader.decoder, reader.family, form or reader.form)
    dtypes = {path: target_dtype(path, reader.dtype_of(path), asked) for path in plan.shapes}
    shards = _shards(plan, dtypes, max_shard_bytes)
    total = sum(_nbytes(tensor, dtypes) for tensor in plan)
    work = incomplete_folder(output)
    identity = {
        "digest": reader.digest,
        "form": plan.form,
        "dtype": None if asked is None else asked.name,
        "max_shard_bytes": max_shard_bytes,
    }
    with write_errors(work), exclusive(work):
        if _is_finished(work, identity):
            if progress is not None:
                progress(Progress(done_bytes=total, total_bytes=total, label="start"))
        else:
            _prepare(work, identity, overwrite)
            unfinished = incomplete_folder(work / _FINISHED)
            unfinished.mkdir()
            check_space(unfinished, total)
            places = _write_headers(unfinished, shards, dtypes)
            _write_tensors(reader, plan, dtypes, unfinished, places, total, progress)
            copy_side_files(reader, unfinished, _exported_config(reader, dtypes))
            if len(shards) > 1:
                _write_index(unfinished, places, total)
            sync_tree(unfinished)
            os.rename(unfinished, work / _FINISHED)
            sync(work)
        check_output(output, overwrite, reader.folder)  # again: what has come there meanwhile is somebody's
        commit(work / _FINISHED, output)
        remove(work, last=work / _PLAN_NAME)
    return ExportReport(
        output=output,
        family=reader.family.model_type,
        form=plan.form,
        tensors=sum(map(len, shards.values())),
        files=tuple(shards),
        nbytes=total,
        seconds=time.monotonic() - started,
    )


def _is_finished(work: Path, identity: Mapping[str, Any]) -> bool:
    """Whether an earlier run of this very export was killed when everything was written."""
    if identity["digest"] is None or not (work / _FINISHED).exists() or not (work / _PLAN_NAME).exists():
        return False
    return (work / _PLAN_NAME).read_text(encoding="utf-8") == _plan(identity)


def _prepare(work: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make `work` an empty folder of this export, discarding what an interrupted one has left."""
    has_plan, has_model = (work / _PLAN_NAME).exists(), (work / _FINISHED).exists()
    check_unfinished_work(work, _PLAN_NAME, has_plan, overwrite or not has_model)
    clear(work, last=work / _PLAN_NAME)
    write_file(work / _PLAN_NAME, _plan(identity))


def _plan(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, indent=1) + "\n"


def _nbytes(tensor: StoredTensor, dtypes: Mapping[str, np.dtype]) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * dtypes[tensor.path].itemsize


def _shards(
    tensors: Iterable[StoredTensor], dtypes: Mapping[str, np.dtype], max_shard_bytes: int
) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, filled in the order of a forward pass."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor, dtypes)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _write_headers(
    work: Path, shards: Mapping[str, list[StoredTensor]], dtypes: Mapping[str, np.dtype]
) -> dict[str, _Place]:
    """Create every file with its header and final size; where each tensor's data goes."""
    places: dict[str, _Place] = {}
    for file, tensors in shards.items():
        # Wider numbers first, as the reference implementation does: every tensor stays aligned to its numbers.
        tensors = sorted(tensors, key=lambda tensor: -dtypes[tensor.path].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        position = 0
        for tensor in tensors:
            end = position + _nbytes(tensor, dtypes)
            header[tensor.name] = {
                "dtype": SAFETENSORS_NAMES[dtypes[tensor.path]],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            offsets[tensor.name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(work / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + position)
        places |= {name: _Place(file, 8 + len(text) + offset) for name, offset in offsets.items()}
    return places


def _write_tensors(
    reader: Checkpoint,
    plan: TensorPlan,
    dtypes: Mapping[str, np.dtype],
    work: Path,
    places: Mapping[str, _Place],
    total: int,
    progress: ProgressCallback | None,
) -> None:
    sizes = sizes_of(plan.shapes, plan.sliced_axis, dtypes.__getitem__)
    done = 0
    if progress is not None:
        progress(Progress(done_bytes=0, total_bytes=total, label="start"))
    for piece in (piece for part in plan_parts(sizes, _SLICE_BYTES) for piece in part.slices):
        values = reader.read_slice(piece.path, piece.start, piece.stop, dtypes[piece.path])
        for tensor in plan.tensors[piece.path]:
            if rows := tensor.rows(piece.start, piece.stop):
                stored = np.ascontiguousarray(tensor.layout.to_stored(tensor.region(values, piece.start)))
                place = places[tensor.name]
                row_bytes = stored.nbytes // len(rows)
                _pwrite(work / place.file, stored, place.offset + rows.start * row_bytes)
        done += values.nbytes
        if progress is not None:
            progress(Progress(done_bytes=done, total_bytes=total, label=piece.path))


def _pwrite(file: Path, values: np.ndarray, offset: int) -> None:
    data = memoryview(values.reshape(-1).view(np.uint8))
    descriptor = os.open(file, os.O_WRONLY)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)
    finally:
        os.close(descriptor)


def _write_index(work: Path, places: Mapping[str, _Place], total: int) -> None:
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: place.file for name, place in sorted(places.items())},
    }
    (work / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _exported_config(reader: Checkpoint, dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
    """`config.json` without the quantization that is gone, and with the dtype that was written."""
    config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
    return naming_dtype(config, dtypes[MAIN_PARAMETER])
