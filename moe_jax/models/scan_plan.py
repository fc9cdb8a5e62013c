"""Which layers share one compiled body: runs of equal layers, or of equal groups of layers, become one scan each."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """`period * repeats` consecutive layers: `period` different ones, the whole group `repeats` times."""

    start: int
    """Index of the first layer."""
    period: int
    """Layers in a group; each is compiled once."""
    repeats: int
    """How often the group is run."""

    def layers_at(self, position: int) -> range:
        """The layers that stand at `position` of their group, in order."""
        return range(self.start + position, self.start + self.period * self.repeats, self.period)


def plan_segments(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Split a decoder into segments so that as few layers as possible are compiled, in as few segments as possible.

    Args:
        kinds: one value per layer; layers with equal values can share a compiled body.

    Returns:
        Segments in the order of the layers. For example DeepSeek-V3's 3 dense and 58 sparse layers give (0, 1, 3) and
        (3, 1, 58), and gpt-oss' alternating 36 layers give (0, 2, 18).
    """
    numbers: dict[Hashable, int] = {}
    layers = [numbers.setdefault(kind, len(numbers)) for kind in kinds]

    # best[i] = (compiled layers, segments, first segment) of the cheapest plan of layers[i:].
    best: list[tuple[int, int, Segment | None]] = [(0, 0, None)] * (len(layers) + 1)
    for start in reversed(range(len(layers))):
        options = []
        for period in range(1, len(layers) - start + 1):
            for repeats in range(1, _full_periods(layers, start, period) + 1):
                compiled, segments, _ = best[start + period * repeats]
                options.append((compiled + period, segments + 1, Segment(start, period, repeats)))
        best[start] = min(options, key=lambda option: (option[0], option[1], option[2].period))

    plan, start = [], 0
    while (segment := best[start][2]) is not None:
        plan.append(segment)
        start += segment.period * segment.repeats
    return tuple(plan)


def _full_periods(layers: Sequence[int], start: int, period: int) -> int:
    """How often the group `layers[start:start + period]` follows itself, the first time included."""
    group = layers[start : start + period]
    repeats = 1
    while layers[start + repeats * period : start + (repeats + 1) * period] == group:
        repeats += 1
    return repeats
