"""What long operations tell their caller."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an operation has come."""

    done_bytes: int
    """Bytes finished, those of an earlier, interrupted run included."""
    total_bytes: int
    """Bytes in all; the same in every event of an operation."""
    label: str
    """What was just finished, such as a part's or a parameter's name."""


ProgressCallback = Callable[[Progress], None]
"""Called before any work (`label` "start") and then after each step; never from two threads at once."""
