"""How a tensor of a checkpoint and a region of one of our parameters hold the same numbers: a pattern, both ways.

A pattern such as `"e h (i g) -> e g i h"` reads as in einops: on the left the axes of the stored tensor (parentheses:
several axes merged into one, the last one fastest), on the right the axes of our parameter. The first axis of a stored
tensor is always a single axis of ours, so that consecutive rows of the tensor are a consecutive slice of the parameter
and both can be streamed.
"""

import dataclasses
import functools
import math
import re

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One pattern, parsed."""

    stored_groups: tuple[tuple[str, ...], ...]
    """Axes of the stored tensor, each the axes of ours that are merged in it."""
    axes: tuple[str, ...]
    """Axes of our parameter."""

    @property
    def sliced_axis(self) -> int:
        """The axis of our parameter that is the first axis of the stored tensor."""
        return self.axes.index(self.stored_groups[0][0])

    @property
    def keeps_order(self) -> bool:
        """Whether the stored tensor's bytes are the region's, in the same order."""
        return self._split == self.axes

    @property
    def _split(self) -> tuple[str, ...]:
        return tuple(axis for group in self.stored_groups for axis in group)

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of the stored tensor of a parameter region of this `shape`."""
        sizes = dict(zip(self.axes, shape, strict=True))
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.stored_groups)

    def split_view(self, region: np.ndarray) -> np.ndarray:
        """A view of `region` whose axes stand in the stored order, merged axes still apart."""
        return region.transpose([self.axes.index(axis) for axis in self._split])

    def to_stored(self, region: np.ndarray) -> np.ndarray:
        """The stored tensor's content, given ours; a view where the layout allows it."""
        return self.split_view(region).reshape(self.stored_shape(region.shape))


@functools.cache
def parse_layout(pattern: str) -> Layout:
    """The layout that `pattern` describes.

    Raises:
        ValueError: Both sides don't name the same axes once each, or the first stored axis is a merged one.
    """
    left, _, right = pattern.partition("->")
    groups = tuple(tuple((merged or single).split()) for merged, single in re.findall(r"\(([^()]*)\)|(\w+)", left))
    layout = Layout(groups, tuple(right.split()))
    split = [axis for group in groups for axis in group]
    if len(set(split)) != len(split) or sorted(split) != sorted(layout.axes):
        raise ValueError(f"both sides of a layout must name the same axes once each, got {pattern!r}")
    if len(groups[0]) != 1:
        raise ValueError(f"the first stored axis must be a single axis, got {pattern!r}")
    return layout


COPY = {1: parse_layout("a -> a"), 2: parse_layout("a b -> a b"), 3: parse_layout("a b c -> a b c")}
"""By rank: stored as we hold it."""

LINEAR = parse_layout("out in -> in out")
"""Torch's linear weight, our kernel."""
