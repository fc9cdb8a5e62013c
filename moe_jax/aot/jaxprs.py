"""The equations of traced programs."""

from collections.abc import Container, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn  # pyright: ignore[reportPrivateImportUsage]


def equations(value: Any, *, not_inside: Container[str] = ()) -> Iterator[JaxprEqn]:
    """The equations of a jaxpr and of all jaxprs in their parameters, in the order of the text; of any other value, none.

    Args:
        value: a program, an equation's parameter, or a list or tuple of these.
        not_inside: names of primitives whose parameters aren't looked into.
    """
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from equations(item, not_inside=not_inside)
    elif isinstance(value, (Jaxpr, ClosedJaxpr)):
        for equation in value.eqns:
            yield equation
            if equation.primitive.name not in not_inside:
                yield from equations(tuple(equation.params.values()), not_inside=not_inside)
