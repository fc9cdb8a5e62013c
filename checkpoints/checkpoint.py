"""What every source of parameters offers: a Hugging Face folder, a converted folder or a model in memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_jax.families import Decoder, Family, get_family, parameter_shapes
from moe_jax.families.names import CheckpointForm
from moe_jax.families.parameters import FLOAT32_PARAMETERS

from .casting import change_dtype
from .dtypes import weight_dtype
from .errors import CheckpointError
from .file_names import CONFIG_NAME
from .layout import Shape
from .safetensors_file import FileRange
from .tensor_plan import default_sliced_axis, is_expert_leaf

Region = tuple[slice, ...]
"""One slice per axis of a parameter, with start and stop given."""


class Checkpoint(Protocol):
    """Parameters by path, as `moe_jax.families.parameter_shapes` names and shapes them."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`."""
        ...

    @property
    def family(self) -> Family:
        """The row of its `model_type`."""
        ...

    @property
    def decoder(self) -> Decoder:
        """What the configuration describes."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where `generation_config.json` and tokenizer files lie, if anywhere."""
        ...

    @property
    def form(self) -> CheckpointForm:
        """The Hugging Face form that it came in, and goes back to unless told otherwise."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Path -> shape of every parameter."""
        ...

    @property
    def digest(self) -> str | None:
        """Identifies the content, so that an interrupted conversion knows it again; None: it starts anew."""
        ...

    @property
    def quantization(self) -> str | None:
        """Method by which the stored weights are quantized; they are read as ordinary numbers."""
        ...

    @property
    def dropped(self) -> Mapping[str, str]:
        """Tensors of the source that are left out on purpose -> why."""
        ...

    def dtype_of(self, path: str) -> np.dtype:
        """Dtype in which a parameter is read by default; CheckpointError for an unknown path."""
        ...

    def sliced_axis(self, path: str) -> int:
        """The axis along which `read_slice` takes slices; CheckpointError for an unknown path."""
        ...

    def read(self, path: str, *, experts: range | None = None, dtype: Any = None) -> np.ndarray:
        """A parameter, whole.

        Args:
            path: One of `shapes`.
            experts: Only these experts (step 1) of an expert parameter, whose first axis they are; only their bytes
                are read.
            dtype: Convert to this dtype, except parameters that must stay float32; None: `dtype_of(path)`.

        Raises:
            CheckpointError: Unknown path, experts that aren't there, an illegal dtype or one that cannot hold a value, or
                a file that cannot be read.
        """
        ...

    def read_slice(self, path: str, start: int, stop: int, dtype: Any = None) -> np.ndarray:
        """Elements `start` up to `stop` of the axis `sliced_axis(path)`; otherwise as `read`.

        Raises:
            CheckpointError: As `read`, or the axis has no such elements.
        """
        ...

    def read_region(self, path: str, region: Region, dtype: Any = None) -> np.ndarray:
        """A part of a parameter; of a file, hardly more than its bytes are read where the stored form allows it.

        Along `sliced_axis(path)` Hugging Face folders do, and for experts all. Otherwise it takes a folder that was
        converted for the devices that share it (`convert(..., shards=)`); elsewhere the rest of what is read is thrown
        away.

        Raises:
            CheckpointError: As `read`, or the parameter has no such region.
        """
        ...

    def file_ranges(self, path: str, start: int, stop: int, dtype: Any = None) -> Sequence[FileRange] | None:
        """Where exactly the bytes that `read_slice` would return are found, one after the other; None: nowhere.

        Raises:
            CheckpointError: Unknown path, the sliced axis has no such elements, or an illegal dtype.
        """
        ...


def target_dtype(path: str, stored: np.dtype, dtype: Any) -> np.dtype:
    """The dtype in which a parameter is delivered when the caller asks for `dtype` (None: as stored)."""
    if dtype is None:
        return stored
    if path.rpartition(".")[2] in FLOAT32_PARAMETERS:
        return np.dtype(np.float32)
    return weight_dtype(dtype)


def describe(config: Mapping[str, Any], where: object) -> tuple[Family, Decoder]:
    """Family and decoder of a `config.json`; CheckpointError naming `where` when it isn't understood."""
    try:
        family = get_family(config)
        return family, family.build_decoder(config)
    except (ValueError, OverflowError) as error:  # the latter of sizes and factors that no model has
        reason = str(error)
        # Families speak of "config.json", whatever file the settings are from.
        is_named = reason.startswith(CONFIG_NAME)
        raise CheckpointError(
            f"{where}{reason.removeprefix(CONFIG_NAME)}" if is_named else f"{where}: {reason}"
        ) from error


class SlicedReader:
    """The part of `Checkpoint` that follows from `_read_slice`: what is asked for is checked here, for all of them."""

    shapes: Mapping[str, Shape]

    def sliced_axis(self, path: str) -> int:
        """Outputs of a linear map, else the first axis."""
        self.shape_of(path)
        return default_sliced_axis(path)

    def read_slice(self, path: str, start: int, stop: int, dtype: Any = None) -> np.ndarray:
        """See `Checkpoint.read_slice`."""
        self._check_slice(path, start, stop)
        return self._read_slice(path, start, stop, dtype)

    def read_region(self, path: str, region: Region, dtype: Any = None) -> np.ndarray:
        """See `Checkpoint.read_region`."""
        shape = self.shape_of(path)
        if len(region) != len(shape) or not all(map(_is_within, region, shape)):
            raise CheckpointError(f"a region of {path} must be slices of step 1 within {list(shape)}, got {region}")
        return self._read_region(path, region, dtype)

    def file_ranges(self, path: str, start: int, stop: int, dtype: Any = None) -> Sequence[FileRange] | None:
        """See `Checkpoint.file_ranges`."""
        self._check_slice(path, start, stop)
        return self._file_ranges(path, start, stop, dtype)

    def _check_slice(self, path: str, start: int, stop: int) -> None:
        length = self.shape_of(path)[self.sliced_axis(path)]
        if not 0 <= start <= stop <= length:
            raise CheckpointError(f"a slice of {path} must be within 0..{length}, got {start}..{stop}")

    def _read_slice(self, path: str, start: int, stop: int, dtype: Any) -> np.ndarray:
        """A slice that is there."""
        raise NotImplementedError

    def _read_region(self, path: str, region: Region, dtype: Any) -> np.ndarray:
        """A region that is there."""
        axis = self.sliced_axis(path)
        part = self._read_slice(path, region[axis].start, region[axis].stop, dtype)
        return part[tuple(slice(None) if index == axis else wanted for index, wanted in enumerate(region))]

    def _file_ranges(self, path: str, start: int, stop: int, dtype: Any) -> Sequence[FileRange] | None:
        """Nowhere."""
        return None

    def read(self, path: str, *, experts: range | None = None, dtype: Any = None) -> np.ndarray:
        """See `Checkpoint.read`."""
        shape = self.shape_of(path)
        if experts is None:
            return self.read_slice(path, 0, shape[self.sliced_axis(path)], dtype)
        if not is_expert_leaf(path):
            raise CheckpointError(f"{path} has no axis of experts; leave out experts=")
        if experts.step != 1 or not 0 <= experts.start <= experts.stop <= shape[0]:
            raise CheckpointError(f"experts of {path} must be a range of step 1 within 0..{shape[0]}, got {experts}")
        return self.read_slice(path, experts.start, experts.stop, dtype)

    def shape_of(self, path: str) -> Shape:
        """Shape of a parameter; CheckpointError for a path that isn't there."""
        if path not in self.shapes:
            raise CheckpointError(f"there is no parameter {path!r} in this checkpoint")
        return self.shapes[path]


def _is_within(wanted: slice, length: int) -> bool:
    return wanted.step in (None, 1) and 0 <= wanted.start <= wanted.stop <= length


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemoryCheckpoint(SlicedReader):
    """Parameters that are already arrays, for saving a model."""

    config: Mapping[str, Any]
    leaves: Mapping[str, Any]
    """Path -> array (numpy or JAX). May be a lazy mapping: a leaf is looked up each time it is read."""
    folder: Path | None = None
    form: CheckpointForm = dataclasses.field(init=False)
    """The family's usual form."""
    family: Family = dataclasses.field(init=False)
    decoder: Decoder = dataclasses.field(init=False)
    shapes: Mapping[str, Shape] = dataclasses.field(init=False)

    digest = None
    quantization = None
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        family, decoder = describe(self.config, "config")
        shapes = parameter_shapes(decoder)
        problems = [f"{path}: missing" for path in shapes.keys() - self.leaves.keys()]
        problems += [f"{path}: unexpected" for path in self.leaves.keys() - shapes.keys()]
        if problems:
            raise CheckpointError("the parameters don't fit the configuration:", sorted(problems))
        described = {"family": family, "decoder": decoder, "shapes": shapes, "form": family.native_form}
        for name, value in described.items():
            object.__setattr__(self, name, value)

    def dtype_of(self, path: str) -> np.dtype:
        """Dtype of the array."""
        self.shape_of(path)
        return np.dtype(self.leaves[path].dtype)

    def _read_slice(self, path: str, start: int, stop: int, dtype: Any) -> np.ndarray:
        shape, leaf = self.shapes[path], self.leaves[path]
        if tuple(leaf.shape) != shape:
            raise CheckpointError(f"{path}: shape must be {list(shape)}, got {list(leaf.shape)}")
        window = (slice(None),) * self.sliced_axis(path) + (slice(start, stop),)
        return change_dtype(np.asarray(leaf[window]), target_dtype(path, np.dtype(leaf.dtype), dtype), path)
