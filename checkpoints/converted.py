"""Reads a converted folder."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from moe_jax.families import parameter_shapes
from moe_jax.families.names import CheckpointForm

from .casting import change_dtype
from .checkpoint import Region, SlicedReader, describe, target_dtype
from .checkpoint_json import read_checkpoint_json
from .errors import CheckpointError
from .file_names import CONFIG_NAME, MANIFEST_NAME, PARTS_FOLDER
from .layout import Shape
from .manifest import Manifest
from .parts import Slice
from .zarr_files import array_problems


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A slice of a parameter and the part that holds it."""

    part: str
    slice: Slice


class ConvertedCheckpoint(SlicedReader):
    """A folder that `convert` wrote; see `moe_jax.checkpoints.checkpoint.Checkpoint`.

    Raises:
        CheckpointError: The folder isn't whole, or doesn't fit its `config.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.from_json(read_checkpoint_json(folder / MANIFEST_NAME), folder / MANIFEST_NAME)
        self.config: dict[str, Any] = read_checkpoint_json(folder / CONFIG_NAME)
        self.family, self.decoder = describe(self.config, folder / CONFIG_NAME)
        if self.manifest.family != self.family.model_type:
            raise CheckpointError(
                f"{folder / MANIFEST_NAME}: family is {self.manifest.family!r}, but {CONFIG_NAME} says {self.family.model_type!r}"
            )
        self.form: CheckpointForm = cast(CheckpointForm, self.manifest.form)
        self.quantization = self.manifest.quantization
        self.dropped: Mapping[str, str] = self.manifest.dropped
        self.shapes: Mapping[str, Shape] = parameter_shapes(self.decoder)
        problems = self._problems()
        if problems:
            raise CheckpointError(f"{folder}: not a whole converted checkpoint:", problems)

    @property
    def digest(self) -> str:
        """That of the source, and of what was asked for; of a model that was saved from memory, that of these files."""
        if self.manifest.digest is None:
            return self._digest_of_files()
        return f"{self.manifest.digest}:{self.manifest.dtype}"

    def _digest_of_files(self) -> str:
        """SHA-256 over `config.json`, the manifest, and the name, size and time of change of every file of the parts."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(self.manifest.to_json().encode())
        for file in sorted((self.folder / PARTS_FOLDER).rglob("*")):
            if file.is_file():
                status = file.stat()
                name = file.relative_to(self.folder)
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    @cached_property
    def _slices(self) -> Mapping[str, list[_Stored]]:
        slices: dict[str, list[_Stored]] = {}
        for part in self.manifest.parts:
            for piece in part.slices:
                slices.setdefault(piece.path, []).append(_Stored(part.name, piece))
        return slices

    def _problems(self) -> list[str]:
        leaves = self.manifest.leaves
        problems = [f"{path}: missing in {MANIFEST_NAME}" for path in self.shapes if path not in leaves]
        problems += [f"{path}: unexpected in {MANIFEST_NAME}" for path in leaves if path not in self.shapes]
        for path, shape in self.shapes.items():
            if path not in leaves:
                continue
            if leaves[path].shape != shape:
                problems.append(f"{path}: shape must be {list(shape)}, got {list(leaves[path].shape)}")
                continue
            position = 0
            for stored in self._slices.get(path, []):
                if stored.slice.start != position:
                    break
                position = stored.slice.stop
            if position != shape[leaves[path].axis]:
                problems.append(f"{path}: the parts do not hold all of it")
        for part in self.manifest.parts:
            if not (self.folder / PARTS_FOLDER / part.name).is_dir():
                problems.append(f"{self.folder / PARTS_FOLDER / part.name}: missing")
        return problems

    def check_files(self) -> None:
        """Compare the files of every part, by name and size, with what they should hold; no value is read.

        Raises:
            CheckpointError: Listing every file that is missing or of a wrong size.
        """
        problems: list[str] = []
        for part in self.manifest.parts:
            for piece in part.slices:
                leaf = self.manifest.leaves[piece.path]
                array = self.folder / PARTS_FOLDER / part.name / piece.path
                problems += array_problems(array, leaf.slice_shape(piece.start, piece.stop), leaf.dtype)
        if problems:
            raise CheckpointError(f"{self.folder}: not a whole converted checkpoint:", problems)

    def sliced_axis(self, path: str) -> int:
        """The axis along which the parts split it."""
        self.shape_of(path)
        return self.manifest.leaves[path].axis

    def dtype_of(self, path: str) -> np.dtype:
        """The dtype on disk."""
        self.shape_of(path)
        return self.manifest.leaves[path].dtype

    def _read_slice(self, path: str, start: int, stop: int, dtype: Any) -> np.ndarray:
        region = [slice(0, length) for length in self.shapes[path]]
        region[self.sliced_axis(path)] = slice(start, stop)
        return self._read_region(path, tuple(region), dtype)

    def _read_region(self, path: str, region: Region, dtype: Any) -> np.ndarray:
        """Of every part, the chunks that the region touches are read."""
        from .orbax_part import read_part_into

        leaf, axis = self.manifest.leaves[path], self.sliced_axis(path)
        out = np.empty([wanted.stop - wanted.start for wanted in region], target_dtype(path, leaf.dtype, dtype))
        start, stop = region[axis].start, region[axis].stop
        for stored in self._slices.get(path, []):
            first, last = stored.slice.start, stored.slice.stop
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            window = out[(slice(None),) * axis + (slice(begin - start, end - start),)]
            piece = window if out.dtype == leaf.dtype else np.empty(window.shape, leaf.dtype)
            wanted = (*region[:axis], slice(begin - first, end - first), *region[axis + 1 :])
            folder = cast(Path, self.folder) / PARTS_FOLDER / stored.part
            read_part_into(piece, folder, path, wanted, leaf.slice_shape(first, last))
            if piece is not window:
                window[...] = change_dtype(piece, out.dtype, f"{folder}: {path}")
        return out
