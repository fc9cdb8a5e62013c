"""Sizes in whole tiles: static ones, and arrays of them."""

from typing import TypeVar

from jaxtyping import Array

Size = TypeVar("Size", int, Array)


def ceil_div(value: Size, divisor: int) -> Size:
    """How many parts of `divisor` hold `value`."""
    return -(-value // divisor)


def round_up(value: Size, multiple: int) -> Size:
    """The least multiple that is not below `value`."""
    return ceil_div(value, multiple) * multiple
