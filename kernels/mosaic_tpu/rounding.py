"""Static sizes in whole tiles."""


def ceil_div(value: int, divisor: int) -> int:
    """How many parts of `divisor` hold `value`."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return ceil_div(value, multiple) * multiple
