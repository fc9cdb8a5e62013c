"""Types of JSON values: a wrong one in a file is named before it fails in a computation."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class JSONType:
    """A type of JSON values."""

    words: str
    """As an error says it: "must be ..."."""
    accepts: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if _is_integer(value):
        return abs(value) <= sys.float_info.max  # JSON's integers have any number of digits
    return isinstance(value, float) and math.isfinite(value)


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(accepts, value))


INTEGER = JSONType("an integer", _is_integer)
NATURAL = JSONType("an integer of at least 0", lambda value: _is_integer(value) and value >= 0)
POSITIVE_INTEGER = JSONType("a positive integer", lambda value: _is_integer(value) and value > 0)
COUNT = JSONType("a positive integer of at most 100,000", lambda value: _is_integer(value) and 0 < value <= 100_000)
"""Of things that are listed one by one: far more than any model has, and no more than a machine can list."""
NUMBER = JSONType("a finite number", _is_number)
NUMBER_FROM_0 = JSONType("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
NUMBER_ABOVE_1 = JSONType("a finite number above 1", lambda value: _is_number(value) and value > 1)
POSITIVE_NUMBER = JSONType("a positive finite number", lambda value: _is_number(value) and value > 0)
BOOLEAN = JSONType("true or false", lambda value: isinstance(value, bool))
STRING = JSONType("a string", lambda value: isinstance(value, str))
OBJECT = JSONType("an object", lambda value: isinstance(value, Mapping))
INTEGERS = JSONType("a list of integers", lambda value: _is_list(value, _is_integer))
STRINGS = JSONType("a list of strings", lambda value: _is_list(value, STRING.accepts))
INTEGER_OR_INTEGERS = JSONType(
    "an integer or a list of integers", lambda value: _is_integer(value) or _is_list(value, _is_integer)
)


def check_types(values: Mapping[str, Any], types: Mapping[str, JSONType], *, file: str, inside: str = "") -> None:
    """Raise ValueError naming every one of `values` that has another type than `types` says. Null counts as absent.

    Args:
        values: the object in `file`, or one in it.
        types: key -> type; what isn't there may be anything.
        file: where the values stand.
        inside: the key of the object in it.
    """
    prefix = f"{inside}." if inside else ""
    problems = [
        f"{prefix}{name} must be {types[name].words}, got {value!r}"
        for name, value in values.items()
        if value is not None and name in types and not types[name].accepts(value)
    ]
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
