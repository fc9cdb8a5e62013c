"""How parameters are split into parts: per layer, and there per group of consecutive experts.

A part is what is read, converted and committed at a time, so it bounds memory, and it is what a host reads. Parameters
outside the experts share parts; one that is larger than a part is split along its sliced axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from .layout import Shape
from .tensor_plan import is_expert_leaf, layer_of

PART_NAME = re.compile(r"(model|layers)\.[\w.-]+")
"""What the names look like; each is that of a folder."""

Sizes = Mapping[str, tuple[int, int]]
"""Parameter -> length of its sliced axis, bytes of one step along it."""


def sizes_of(
    shapes: Mapping[str, Shape], axis_of: Callable[[str], int], dtype_of: Callable[[str], np.dtype]
) -> dict[str, tuple[int, int]]:
    """The `Sizes` of parameters with these shapes, sliced axes and dtypes."""
    sizes = {}
    for path, shape in shapes.items():
        length = shape[axis_of(path)]
        sizes[path] = (length, math.prod(shape) * dtype_of(path).itemsize // max(length, 1))
    return sizes


@dataclasses.dataclass(frozen=True)
class Slice:
    """Elements `start` up to `stop` of a parameter's sliced axis."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Slices that are stored together as one Orbax checkpoint."""

    name: str
    slices: tuple[Slice, ...]


def plan_parts(sizes: Sizes, part_bytes: int, share_lengths: Mapping[str, int] | None = None) -> tuple[Part, ...]:
    """Parts that together hold every parameter once, in the order of `sizes`; each of about `part_bytes` at most.

    Args:
        sizes: what to split.
        part_bytes: size of a part, unless one step along a sliced axis is larger.
        share_lengths: parameter -> how many steps along its sliced axis one device holds. A group of experts never
            reaches over a multiple of that, and a larger parameter is split at such multiples.

    Raises:
        ValueError: `part_bytes` isn't positive.
    """
    share_lengths = {} if share_lengths is None else share_lengths
    if part_bytes < 1:
        raise ValueError(f"the size of a part must be positive, got {part_bytes}")
    sections: dict[tuple[int | None, bool], list[str]] = {}
    for path in sizes:
        sections.setdefault((layer_of(path), is_expert_leaf(path)), []).append(path)
    parts: list[Part] = []
    for (layer, of_experts), paths in sections.items():
        name = "model" if layer is None else f"layers.{layer:05d}"
        section = {path: sizes[path] for path in paths}
        plan = _expert_parts if of_experts else _other_parts
        parts += plan(name, section, part_bytes, share_lengths)
    return tuple(parts)


def _expert_parts(name: str, sizes: Sizes, part_bytes: int, share_lengths: Mapping[str, int]) -> Iterator[Part]:
    """Groups of consecutive experts, as even as possible; an expert larger than a part is split by parameter."""
    first, (num_experts, _) = next(iter(sizes.items()))
    expert_bytes = sum(step for _, step in sizes.values())
    share = share_lengths.get(first, num_experts)
    groups = -(-share // max(1, part_bytes // max(expert_bytes, 1)))
    for start, stop in _runs(num_experts, share, -(-share // groups)):
        part_name = f"{name}.experts.{start:05d}-{stop - 1:05d}"
        slices = tuple(Slice(path, start, stop) for path in sizes)
        if expert_bytes <= part_bytes:
            yield Part(part_name, slices)
        else:
            yield from (Part(f"{part_name}.{s.path.rpartition('.')[2]}", (s,)) for s in slices)


def _other_parts(name: str, sizes: Sizes, part_bytes: int, share_lengths: Mapping[str, int]) -> Iterator[Part]:
    pending: list[Slice] = []
    pending_bytes = 0
    number = 0
    for piece, nbytes in _pieces(sizes, part_bytes, share_lengths):
        # A part's tree has one leaf per parameter: two slices of one would always be larger than a part.
        if pending and pending_bytes + nbytes > part_bytes:
            yield Part(f"{name}.{number:03d}", tuple(pending))
            pending, pending_bytes, number = [], 0, number + 1
        pending.append(piece)
        pending_bytes += nbytes
    if pending:
        yield Part(f"{name}.{number:03d}", tuple(pending))


def _pieces(sizes: Sizes, part_bytes: int, share_lengths: Mapping[str, int]) -> Iterator[tuple[Slice, int]]:
    for path, (length, step_bytes) in sizes.items():
        per_piece = max(1, part_bytes // max(step_bytes, 1))
        for start, stop in _runs(length, share_lengths.get(path, length), per_piece):
            yield Slice(path, start, stop), (stop - start) * step_bytes


def _runs(length: int, share: int, longest: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of runs of at most `longest`: of whole shares if those fit, else each within one share."""
    if share:
        whole = max(share, longest - longest % share)
        for begin in range(0, length, whole):
            end = min(begin + whole, length)
            for start in range(begin, end, longest):
                yield start, min(start + longest, end)
