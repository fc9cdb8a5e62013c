"""How an op chooses between its implementations, in the open: every choice can be explained, none is silent."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
from jax.core import Tracer

RequestT = TypeVar("RequestT", contravariant=True)


@dataclasses.dataclass(frozen=True)
class Formulation:
    """One way in which an implementation computes a request."""

    description: str
    """What is computed how, with its block sizes."""
    reason: str
    """Why this one was chosen for the request's shapes and device."""


class Implementation(Protocol[RequestT]):
    """One way to compute an op; a module with these four names is one."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a constant of the module
        """What the implementation is called."""
        ...

    def unsupported(self, request: RequestT) -> str | None:
        """Why this implementation cannot compute the (valid) request, or None if it can."""
        ...

    def formulation(self, request: RequestT) -> Formulation:
        """How it would compute the request."""
        ...

    def run(self, request: RequestT) -> jax.Array:
        """Compute the request, which must not be unsupported."""
        ...


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an op would run for some arguments, and why."""

    op: str
    """Name of the op."""
    implementation: str
    """Name of the implementation that runs."""
    formulation: str
    """How this implementation computes these shapes, with its block sizes."""
    reason: str
    """Why this implementation and this formulation."""
    rejected: tuple[tuple[str, str], ...]
    """Every other implementation, with the reason why it was not taken."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation}, {self.formulation}", f"  because {self.reason}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.rejected])


def choose(
    op: str, implementations: Sequence[Implementation[RequestT]], request: RequestT, name: str | None
) -> tuple[Implementation[RequestT], Choice]:
    """The implementation called `name`, or the first of `implementations` that supports the request.

    Args:
        op: name of the op, for messages.
        implementations: all of them, the preferred ones first; the last but one supports everything, and the last is the
            slow definition, which runs only when asked for by name.
        request: validated arguments.
        name: the implementation asked for, or None.

    Raises:
        ValueError: `name` is not an implementation of the op.
        NotImplementedError: `name` was asked for and does not support the request; the message carries the limit.
    """
    names = [implementation.NAME for implementation in implementations]
    if name is not None and name not in names:
        raise ValueError(f"unknown implementation {name!r} of {op}; legal are {', '.join(names)} and None")
    limits = {implementation.NAME: implementation.unsupported(request) for implementation in implementations}
    if name is None:
        chosen = next(implementation for implementation in implementations if limits[implementation.NAME] is None)
        why = "it is the preferred one that supports these arguments"
    else:
        chosen = implementations[names.index(name)]
        if limits[name] is not None:
            raise NotImplementedError(f"implementation {name!r} of {op} cannot run: {limits[name]}")
        why = "it was asked for by name"
    passed_over = f"{chosen.NAME} was asked for by name" if name else f"{chosen.NAME} is preferred to it"
    formulation = chosen.formulation(request)
    choice = Choice(
        op=op,
        implementation=chosen.NAME,
        formulation=formulation.description,
        reason=f"{why}; {formulation.reason}",
        rejected=tuple((other, limits[other] or passed_over) for other in names if other != chosen.NAME),
    )
    return chosen, choice


def platform_of(*arrays: object) -> str:
    """The platform that computes on these arrays ("cpu", "gpu", "tpu").

    Concrete arrays know it; for traced ones, and for shapes, it is that of the default device.
    """
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            return next(iter(array.devices())).platform
    default_device = jax.config.jax_default_device
    if isinstance(default_device, jax.Device):
        return default_device.platform
    return default_device or jax.default_backend()
