"""How parameters are split into parts: per layer, and there per group of consecutive experts.

A part is what is read, converted and committed at a time, so it bounds memory, and it is what a host reads. Parameters
outside the experts share parts; one that is larger than a part is split along its sliced axis.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from .tensor_plan import is_expert_leaf, layer_of

Sizes = Mapping[str, tuple[int, int]]
"""Parameter -> length of its sliced axis, bytes of one step along it."""


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


def plan_parts(sizes: Sizes, part_bytes: int) -> tuple[Part, ...]:
    """Parts that together hold every parameter once, in the order of `sizes`; each of about `part_bytes` at most.

    Raises:
        ValueError: `part_bytes` isn't positive.
    """
    if part_bytes < 1:
        raise ValueError(f"the size of a part must be positive, got {part_bytes}")
    sections: dict[tuple[int | None, bool], list[str]] = {}
    for path in sizes:
        sections.setdefault((layer_of(path), is_expert_leaf(path)), []).append(path)
    parts: list[Part] = []
    for (layer, of_experts), paths in sections.items():
        name = "model" if layer is None else f"layers.{layer:05d}"
        section = {path: sizes[path] for path in paths}
        parts += _expert_parts(name, section, part_bytes) if of_experts else _other_parts(name, section, part_bytes)
    return tuple(parts)


def _expert_parts(name: str, sizes: Sizes, part_bytes: int) -> Iterator[Part]:
    """Groups of consecutive experts, as even as possible; an expert larger than a part is split by parameter."""
    num_experts = next(iter(sizes.values()))[0]
    expert_bytes = sum(step for _, step in sizes.values())
    groups = -(-num_experts // max(1, part_bytes // max(expert_bytes, 1)))
    per_group = -(-num_experts // groups)
    for start in range(0, num_experts, per_group):
        stop = min(start + per_group, num_experts)
        part_name = f"{name}.experts.{start:05d}-{stop - 1:05d}"
        slices = tuple(Slice(path, start, stop) for path in sizes)
        if expert_bytes <= part_bytes:
            yield Part(part_name, slices)
        else:
            yield from (Part(f"{part_name}.{s.path.rpartition('.')[2]}", (s,)) for s in slices)


def _other_parts(name: str, sizes: Sizes, part_bytes: int) -> Iterator[Part]:
    pending: list[Slice] = []
    pending_bytes = 0
    number = 0
    for piece, nbytes in _pieces(sizes, part_bytes):
        # A part holds at most one slice of a parameter: its tree has one leaf per parameter.
        if pending and (pending_bytes + nbytes > part_bytes or pending[-1].path == piece.path):
            yield Part(f"{name}.{number:03d}", tuple(pending))
            pending, pending_bytes, number = [], 0, number + 1
        pending.append(piece)
        pending_bytes += nbytes
    if pending:
        yield Part(f"{name}.{number:03d}", tuple(pending))


def _pieces(sizes: Sizes, part_bytes: int) -> Iterator[tuple[Slice, int]]:
    for path, (length, step_bytes) in sizes.items():
        per_piece = max(1, part_bytes // max(step_bytes, 1))
        for start in range(0, length, per_piece):
            stop = min(start + per_piece, length)
            yield Slice(path, start, stop), (stop - start) * step_bytes
