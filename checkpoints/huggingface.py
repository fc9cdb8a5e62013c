"""Reads a Hugging Face folder as our parameters, lazily and without torch."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.families.names import CheckpointForm
from moe_jax.families.settings import resolve

from .accounting import OUTPUT_TABLE, account, detect_form
from .checkpoint import SlicedReader, describe, target_dtype
from .checkpoint_json import read_checkpoint_json
from .dtypes import ASSUMED_DTYPE, MAIN_PARAMETER, named_dtype
from .errors import CheckpointError
from .file_names import CONFIG_NAME
from .layout import Shape
from .quantization_config import read_quantization
from .safetensors_file import FileRange, TensorEntry, read_header_bytes
from .safetensors_folder import list_tensors
from .stored_rows import MXFP4Rows, PlainRows, StoredRows, read_in_range
from .tensor_plan import StoredTensor, TensorPlan

_TRANSPOSED_ROWS = 256
"""Rows transposed at a time: enough for whole cache lines in the result, few enough to stay in the cache."""
_PIECE_BYTES = 1 << 23
_CACHE_LINE = 64


class HuggingFaceCheckpoint(SlicedReader):
    """A folder with `config.json` and safetensors files, in either form: a `Checkpoint`.

    Opening reads and checks every header; parameters are read when asked for. Quantized weights are decoded on the way.

    Raises:
        CheckpointError: Listing every problem of the folder: damaged files, tensors that are missing, unexpected or of
            wrong shape or dtype, an unknown family or quantization.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry] | None = None) -> None:
        """Open `folder`; `tensors`, if its files are elsewhere, is what their headers say: no value can be read then."""
        self.folder = folder
        where = folder / CONFIG_NAME
        self.config: dict[str, Any] = read_checkpoint_json(where)
        self.family, self.decoder = describe(self.config, where)
        quantization = read_quantization(self.config, where)
        self._decoded_dtype = np.dtype(ASSUMED_DTYPE) if quantization is None else named_dtype(self.config, where)
        self.tensors = list_tensors(folder) if tensors is None else tensors
        self.plan: TensorPlan = detect_form(self.family, self.decoder, self.tensors)
        prediction_layers = resolve(self.family.prediction_layers, self.config)
        accounting = account(self.plan, self.family, self.decoder, self.tensors, quantization, prediction_layers)
        if accounting.problems:
            raise CheckpointError(f"{folder}: not a whole {self.family.model_type} checkpoint:", accounting.problems)
        self.form: CheckpointForm = self.plan.form
        self.quantization: str | None = None if quantization is None else quantization.method
        self.dropped: Mapping[str, str] = accounting.dropped
        self.shapes: Mapping[str, Shape] = self.plan.shapes
        self._rows = accounting.rows

    def check_tied_embeddings(self) -> None:
        """Read the output table, if there is one although it is tied to the embedding table, and compare the two.

        Raises:
            CheckpointError: They differ. `transformers` doesn't tie them then, whatever `config.json` says.
        """
        names = self.family.names
        output = self.tensors.get(names.get(OUTPUT_TABLE, ""))
        embedding = self.tensors.get(names[MAIN_PARAMETER])
        if not self.decoder.tie_word_embeddings or output is None or embedding is None:
            return
        if not output.has_bytes_of(embedding):
            raise CheckpointError(
                f"{output.file}: {output.name} differs from {embedding.name}, although they are tied by "
                f"{self.folder / CONFIG_NAME}: its tie_word_embeddings should be false"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, in order."""
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    @property
    def digest(self) -> str:
        """SHA-256 over `config.json` and each file's name, header, size and time of change."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            header, size = read_header_bytes(file)
            digest.update(f"{file.name}\0{size}\0{file.stat().st_mtime_ns}\0".encode())
            digest.update(header)
        return digest.hexdigest()

    def sliced_axis(self, path: str) -> int:
        """The axis that is consecutive in the files."""
        self.shape_of(path)
        return self.plan.sliced_axis(path)

    def dtype_of(self, path: str) -> np.dtype:
        """The files' dtype; for decoded weights that of `config.json`, bfloat16 if it names none."""
        self.shape_of(path)
        return self._rows[self.plan.tensors[path][0].name].dtype or self._decoded_dtype

    def _file_ranges(self, path: str, start: int, stop: int, dtype: Any) -> Sequence[FileRange] | None:
        """The tensors' bytes, if their order, numbers and dtype are ours already."""
        stored = self.dtype_of(path)
        if target_dtype(path, stored, dtype) != stored:
            return None
        ranges = []
        for tensor in self.plan.tensors[path]:
            source = self._rows[tensor.name]
            if not isinstance(source, PlainRows) or not tensor.layout.keeps_order:
                return None
            if rows := tensor.rows(start, stop):
                ranges.append(source.entry.range_of(rows))
        return ranges

    def _read_slice(self, path: str, start: int, stop: int, dtype: Any) -> np.ndarray:
        """Tensors are read and decoded by several threads."""
        shape, axis = list(self.shapes[path]), self.sliced_axis(path)
        shape[axis] = stop - start
        part = np.empty(shape, target_dtype(path, self.dtype_of(path), dtype))
        wanted = [(tensor, rows) for tensor in self.plan.tensors[path] if (rows := tensor.rows(start, stop))]

        def fill(job: tuple[StoredTensor, range]) -> None:
            tensor, rows = job
            source = self._rows[tensor.name]
            _fill(tensor, source, tensor.region(part, start), rows)

        if len(wanted) == 1:
            fill(wanted[0])
        else:
            with ThreadPoolExecutor(min(len(wanted) or 1, os.cpu_count() or 1)) as pool:
                list(pool.map(fill, wanted))
        return part


def _fill(tensor: StoredTensor, source: StoredRows, region: np.ndarray, rows: range) -> None:
    """Read `rows` of a tensor into `region`, straight if the layout is a plain copy, else piece by piece."""
    is_packed = isinstance(source, MXFP4Rows)
    layout = tensor.packed_layout if is_packed and tensor.packed_layout is not None else tensor.layout
    target = layout.split_view(region)
    if target.flags.c_contiguous:
        read_in_range(source, target.reshape(layout.stored_shape(region.shape)), rows.start)
        return
    row_shape = layout.stored_shape(region.shape)[1:]
    row_size = math.prod(row_shape)
    step = max(1, min(_TRANSPOSED_ROWS, _PIECE_BYTES // max(row_size * region.itemsize, 1)))
    piece = np.empty((min(step, len(rows)), *row_shape), region.dtype)
    # Rows a power of two apart would compete for the same lines of the cache while they are transposed.
    spread = np.empty((len(piece), row_size + _CACHE_LINE // region.itemsize), region.dtype)[:, :row_size]
    for begin in range(0, len(rows), step):
        count = min(step, len(rows) - begin)
        read_in_range(source, piece[:count], rows.start + begin)
        spread[:count] = piece[:count].reshape(count, row_size)
        target[begin : begin + count] = spread[:count].reshape(count, *target.shape[1:])
