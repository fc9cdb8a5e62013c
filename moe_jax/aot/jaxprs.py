"""The equations of traced programs."""

from collections.abc import Container, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage]

from moe_jax.aot.targets import GpuTarget, TpuTarget


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


def compile_alone(equation: JaxprEqn, target: GpuTarget | TpuTarget) -> None:
    """Compile one equation for one device of `target`; raises what the compiler raises."""
    variables = tuple(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
    alone = Jaxpr(constvars=(), invars=variables, outvars=equation.outvars, eqns=(equation,), effects=equation.effects)
    sharding = target.one_device()
    avals: list[Any] = [variable.aval for variable in variables]
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in avals]
    with target.lowering():
        jax.jit(jaxpr_as_fun(ClosedJaxpr(alone, ()))).lower(*arguments).compile()
