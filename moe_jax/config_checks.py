"""What a configuration asks of its fields, one check per kind of value."""

import math
import numbers
from typing import Any


def check_integer(name: str, value: Any, *, least: int, must: str) -> None:
    """Raise ValueError unless `value` is an integer (of Python or numpy) of at least `least`.

    A size that came out of a division, 16.0, would otherwise get as far as the first array.

    Args:
        name: the field, for the error.
        value: what it was given.
        least: the smallest legal value.
        must: what follows from that, in words, such as "be positive".
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must {must}, got {value}")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a real number, neither infinite nor NaN."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_kind(name: str, value: Any, *kinds: type) -> None:
    """Raise ValueError unless `value` is an instance of one of `kinds`; `type(None)` stands for None."""
    if not isinstance(value, kinds):
        legal = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {legal}, got {value!r}")
