"""`verify`: does an output hold every number of its source?"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.families import Decoder

from .casting import overflowed
from .checkpoint import Checkpoint
from .hub import resolve_source
from .opening import open_checkpoint
from .parts import Slice, plan_parts, sizes_of
from .progress import Progress, ProgressCallback
from .tensor_plan import StoredTensor, plan_tensors

_SLICE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A tensor that is not the same in source and output."""

    tensor: str
    """The source's name of it."""
    parameter: str
    """Our path."""
    values: int
    """How many of its values differ."""
    largest: float
    """Largest absolute difference; NaN if a NaN takes part, infinite if a number became infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What `verify` found."""

    source: Path
    output: Path
    tensors: int
    """Tensors compared, by the source's names; 0 if the models' parameters are not the same, see `settings`."""
    nbytes: int
    """Bytes compared, in the output's dtypes."""
    dropped: Mapping[str, str]
    """Tensors of the source left out on purpose -> why."""
    converted: Mapping[str, str]
    """Parameters whose dtype was changed -> "float32 -> bfloat16"."""
    settings: tuple[str, ...]
    """What their `config.json` say differently of how the model computes, one line for each setting with both values."""
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether the models compute alike and every value is the same, bit by bit."""
        return not self.settings and not self.differences


def verify(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
) -> VerificationReport:
    """Compare every value of `source` with `output`, bit by bit, in little memory.

    Either may be a Hugging Face folder, in either form, or a converted folder. Where the output has another dtype, the
    source's values are rounded to it first; quantized weights are decoded. Of their `config.json`, what says how a model
    computes must be the same: the rest, such as dtype and quantization, may differ. Models whose parameters have other
    names or shapes are different, and none of their values is compared.

    Args:
        source: Folder or hub id of the original.
        output: Folder of the copy.
        revision: Branch, tag or commit of a source on the hub; None: its newest.
        progress: Called with `Progress(done_bytes, total_bytes, label)` after each slice.

    Raises:
        CheckpointError: One of them isn't whole.
    """
    original, copy = open_checkpoint(resolve_source(source, revision)), open_checkpoint(output)
    settings = tuple(_unequal_settings(original, copy))
    if original.family is not copy.family or original.shapes != copy.shapes:
        return VerificationReport(
            source=Path(source),
            output=Path(output),
            tensors=0,
            nbytes=0,
            dropped=original.dropped,
            converted={},
            settings=settings,
            differences=(),
        )
    plan = plan_tensors(original.decoder, original.family, original.form)
    sizes = sizes_of(original.shapes, original.sliced_axis, copy.dtype_of)
    total = sum(length * step for length, step in sizes.values())
    done = 0
    if progress is not None:
        progress(Progress(done_bytes=0, total_bytes=total, label="start"))
    differences: dict[str, Difference] = {}
    for piece in (piece for part in plan_parts(sizes, _SLICE_BYTES) for piece in part.slices):
        for difference in _compare(original, copy, plan.tensors[piece.path], piece):
            known = differences.get(difference.tensor)
            differences[difference.tensor] = difference if known is None else _merged(known, difference)
        done += (piece.stop - piece.start) * sizes[piece.path][1]
        if progress is not None:
            progress(Progress(done_bytes=done, total_bytes=total, label=piece.path))
    return VerificationReport(
        source=Path(source),
        output=Path(output),
        tensors=sum(1 for _ in plan),
        nbytes=total,
        dropped=original.dropped,
        converted={
            path: f"{original.dtype_of(path).name} -> {copy.dtype_of(path).name}"
            for path in original.shapes
            if original.dtype_of(path) != copy.dtype_of(path)
        },
        settings=settings,
        differences=tuple(differences.values()),
    )


def _unequal_settings(original: Checkpoint, copy: Checkpoint) -> list[str]:
    """The families if they differ, because their fields tell nothing then; else every field that differs."""
    if original.family is not copy.family:
        return [f"model_type: {original.family.model_type!r} against {copy.family.model_type!r}"]
    return _unequal_decoders(original.decoder, copy.decoder)


def _unequal_decoders(original: Decoder, copy: Decoder) -> list[str]:
    """Every field that differs with both values; one that differs alike in several layers is named once."""
    found: dict[str, list[int]] = {}
    if len(original.layers) != len(copy.layers):
        found[f"layers: {len(original.layers)} against {len(copy.layers)}"] = []
    else:
        for index, layers in enumerate(zip(original.layers, copy.layers, strict=True)):
            for unequal in _unequal_fields(*layers):
                found.setdefault(unequal, []).append(index)
    without_layers = dataclasses.replace(original, layers=()), dataclasses.replace(copy, layers=())
    return [
        *_unequal_fields(*without_layers),
        *(f"layers {', '.join(map(str, layers))}: {field}" if layers else field for field, layers in found.items()),
    ]


def _unequal_fields(one: Any, other: Any, name: str = "") -> Iterator[str]:
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        for field in dataclasses.fields(one):
            inner = f"{name}.{field.name}" if name else field.name
            yield from _unequal_fields(getattr(one, field.name), getattr(other, field.name), inner)
    elif one != other:
        yield f"{name}: {one!r} against {other!r}"


def _compare(
    original: Checkpoint, copy: Checkpoint, tensors: tuple[StoredTensor, ...], piece: Slice
) -> Iterator[Difference]:
    got = copy.read_slice(piece.path, piece.start, piece.stop)
    # What is decoded must be rounded once, as `convert` does it.
    is_decoded = original.quantization is not None and original.dtype_of(piece.path) != got.dtype
    exact = original.read_slice(piece.path, piece.start, piece.stop, np.float32 if is_decoded else None)
    with np.errstate(over="ignore"):
        expected = exact.astype(got.dtype, copy=False)
    unequal = _bits(expected) != _bits(got)
    if exact.dtype != got.dtype:  # what became infinite is lost, though the copy has the same infinity
        unequal |= overflowed(exact, expected)
    if not unequal.any():
        return
    for tensor in tensors:
        if not tensor.rows(piece.start, piece.stop):
            continue
        of_tensor = tensor.region(unequal, piece.start)
        if of_tensor.any():
            theirs, ours = tensor.region(exact, piece.start)[of_tensor], tensor.region(got, piece.start)[of_tensor]
            with np.errstate(invalid="ignore"):
                distance = np.abs(theirs.astype(np.float64) - ours.astype(np.float64))
            yield Difference(
                tensor=tensor.name, parameter=tensor.path, values=int(of_tensor.sum()), largest=float(distance.max())
            )


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def _merged(first: Difference, second: Difference) -> Difference:
    return dataclasses.replace(
        first, values=first.values + second.values, largest=float(np.maximum(first.largest, second.largest))
    )
