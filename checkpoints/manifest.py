"""`moe_jax.json`: what a converted folder holds and where. It is written last, so a folder that has it is whole."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.families.parameter_splits import split_of
from moe_jax.json_types import NATURAL

from .checkpoint import Checkpoint, target_dtype
from .dtypes import WEIGHT_DTYPES
from .errors import CheckpointError
from .file_names import PARTS_FOLDER
from .layout import Shape
from .parts import PART_NAME, Part, Slice, plan_parts
from .tensor_plan import FORMS, is_expert_leaf

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """What is read from the disk at a time: a run of `length` along `axis`, whole along the others."""

    axis: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter as stored."""

    shape: Shape
    dtype: np.dtype
    axis: int
    """The axis along which it may be split over several parts."""

    def slice_shape(self, start: int, stop: int) -> Shape:
        """Shape of the slice from `start` up to `stop` of the axis."""
        return (*self.shape[: self.axis], stop - start, *self.shape[self.axis + 1 :])

    @property
    def slice_bytes(self) -> int:
        """Bytes of one step along the axis."""
        return self.nbytes // max(self.shape[self.axis], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `moe_jax.json`."""

    family: str
    """`model_type`."""
    form: str
    """Form of the source."""
    digest: str | None
    """Digest of the source."""
    quantization: str | None
    """Method by which the source was quantized; the parts hold ordinary numbers."""
    dropped: Mapping[str, str]
    """Tensors of the source left out on purpose -> why."""
    dtype: str | None
    """Dtype asked for, None if each parameter kept its own."""
    shards: int
    """How many devices, each with an equal share, parts and chunks are laid out for."""
    leaves: Mapping[str, Leaf]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def part_bytes(self, part: Part) -> int:
        """Bytes of the parameters in one part."""
        return sum((s.stop - s.start) * self.leaves[s.path].slice_bytes for s in part.slices)

    def chunk_of(self, piece: Slice) -> Chunk | None:
        """How a slice of a parameter is chunked on disk; None: as a whole."""
        leaf = self.leaves[piece.path]
        if is_expert_leaf(piece.path):
            return Chunk(axis=0, length=1)
        split = split_of(piece.path)
        if split is None or self.shards == 1:
            return None
        share = share_length(leaf.shape[split.dimension], self.shards)
        length = piece.stop - piece.start if split.dimension == leaf.axis else leaf.shape[split.dimension]
        return Chunk(axis=split.dimension, length=min(share, length))

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "source": {
                "form": self.form,
                "digest": self.digest,
                "quantization": self.quantization,
                "dropped": dict(self.dropped),
            },
            "dtype": self.dtype,
            "shards": self.shards,
            "leaves": {
                path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "axis": leaf.axis}
                for path, leaf in self.leaves.items()
            },
            "parts": {part.name: {s.path: [s.start, s.stop] for s in part.slices} for part in self.parts},
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: object) -> "Manifest":
        """The manifest of a file's JSON object.

        Raises:
            CheckpointError: Naming `where`: it isn't one of this version, or says what cannot be, such as a part that lies
                outside the folder.
        """
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{where}: format_version must be {FORMAT_VERSION}, got {version!r}")
        try:
            source = content["source"]
            manifest = cls(
                family=content["family"],
                form=source["form"],
                digest=source["digest"],
                quantization=source["quantization"],
                dropped=source["dropped"],
                dtype=content["dtype"],
                shards=content.get("shards", 1),
                leaves={
                    path: Leaf(shape=tuple(leaf["shape"]), dtype=np.dtype(leaf["dtype"]), axis=leaf["axis"])
                    for path, leaf in content["leaves"].items()
                },
                parts=tuple(
                    Part(name, tuple(Slice(path, start, stop) for path, (start, stop) in slices.items()))
                    for name, slices in content["parts"].items()
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{where}: is not a manifest of format version {FORMAT_VERSION}: {error!r}"
            ) from error
        if problems := list(_problems(manifest)):
            raise CheckpointError(f"{where}: is not a manifest of format version {FORMAT_VERSION}:", problems)
        return manifest


def _problems(manifest: Manifest) -> Iterator[str]:
    """What a manifest that was read says and cannot be; its types are those of the JSON text, whatever they are."""
    if not isinstance(manifest.family, str):
        yield f"family must be a name, got {manifest.family!r}"
    if manifest.form not in FORMS:
        yield f"form must be one of {', '.join(FORMS)}; got {manifest.form!r}"
    for name in ("digest", "quantization", "dtype"):
        if not isinstance(value := getattr(manifest, name), str | None):
            yield f"{name} must be a text or null, got {value!r}"
    if not isinstance(manifest.dropped, dict):
        yield f"dropped must be an object, got {manifest.dropped!r}"
    if not NATURAL.accepts(manifest.shards) or manifest.shards < 1:
        yield f"shards must be positive, got {manifest.shards!r}"
    for path, leaf in manifest.leaves.items():
        if not all(map(NATURAL.accepts, leaf.shape)):
            yield f"{path}: shape must be a list of sizes, got {list(leaf.shape)}"
        elif not NATURAL.accepts(leaf.axis) or leaf.axis >= len(leaf.shape):
            yield f"{path}: axis must be one of its {len(leaf.shape)}, counted from 0; got {leaf.axis!r}"
        if leaf.dtype not in WEIGHT_DTYPES:
            yield f"{path}: dtype must be one of {', '.join(dtype.name for dtype in WEIGHT_DTYPES)}; got {leaf.dtype.name}"
    for part in manifest.parts:
        if not PART_NAME.fullmatch(part.name):
            yield f"{part.name!r} must be the name of a part, a folder in {PARTS_FOLDER}/"
        for piece in part.slices:
            if piece.path not in manifest.leaves:
                yield f"part {part.name!r} holds {piece.path!r}, which is none of the leaves"
            if not NATURAL.accepts(piece.start) or not NATURAL.accepts(piece.stop) or piece.start > piece.stop:
                yield f"part {part.name!r}: {piece.path}: must be from a start up to a stop, got {[piece.start, piece.stop]}"


def plan_conversion(reader: Checkpoint, dtype: np.dtype | None, part_bytes: int, shards: int = 1) -> Manifest:
    """What converting `reader` will write, with options that are those of `convert`."""
    leaves = {
        path: Leaf(shape=shape, dtype=target_dtype(path, reader.dtype_of(path), dtype), axis=reader.sliced_axis(path))
        for path, shape in reader.shapes.items()
    }
    sizes = {path: (leaf.shape[leaf.axis], leaf.slice_bytes) for path, leaf in leaves.items()}
    shares = {}
    for path, leaf in leaves.items():
        split = split_of(path)
        if split is not None and split.dimension == leaf.axis:
            shares[path] = share_length(leaf.shape[leaf.axis], shards)
    return Manifest(
        family=reader.family.model_type,
        form=reader.form,
        digest=reader.digest,
        quantization=reader.quantization,
        dropped=reader.dropped,
        dtype=None if dtype is None else dtype.name,
        shards=shards,
        leaves=leaves,
        parts=plan_parts(sizes, part_bytes, shares),
    )


def share_length(length: int, shards: int) -> int:
    """What one of `shards` devices holds of a dimension that they split; more where they don't divide it evenly."""
    return length // math.gcd(length, shards)
