"""What a configuration asks of its fields, one check per kind of value."""

import dataclasses
import math
import numbers
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, *, least: int, must: str) -> None:
    """Raise ValueError unless `value` is an integer (of Python or numpy) of at least `least`.

    A size that came out of a division, 16.0, would otherwise get as far as the first array.

    Args:
        name: the field, for the error.
        value: what it was given.
        least: the smallest legal value.
        must: what follows from that, in words, such as "be positive".
    """
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must {must}, got {value}")


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer (of Python or numpy); a boolean is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a real number, neither infinite nor NaN; a boolean is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_boolean(name: str, value: Any, remark: str = "") -> None:
    """Raise ValueError, ending in `remark`, unless `value` is a boolean (of Python or numpy).

    What merely counts as true, such as "no" or a list of values, was meant otherwise.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}{remark}")


def check_booleans(config: Any, **remarks: str) -> None:
    """`check_boolean` of every field of the dataclass `config` that is declared `bool`, with the remark under its name."""
    for field in dataclasses.fields(config):
        if field.type is bool:
            check_boolean(field.name, getattr(config, field.name), remarks.get(field.name, ""))


def check_kind(name: str, value: Any, *kinds: type) -> None:
    """Raise ValueError unless `value` is an instance of one of `kinds`; `type(None)` stands for None."""
    if not isinstance(value, kinds):
        legal = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {legal}, got {value!r}")
