"""The definition: the fused MoE block's own, on gathered tokens. Slow."""

from jax import Array

from ..selection import Formulation
from . import xla
from .request import Request

NAME = "reference"


def unsupported(request: Request) -> str | None:
    """Nothing is."""
    return None


def formulation(request: Request) -> Formulation:
    """There is one only."""
    return Formulation("every expert on every rank's tokens, masked", "it is the definition")


def run(request: Request) -> Array:
    """Sum over ranks of what their experts contribute."""
    return xla.run_with(request, NAME)
