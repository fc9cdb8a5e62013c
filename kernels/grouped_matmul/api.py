"""The public grouped matmul: contract, and choice of an implementation."""

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..selection import Choice, Implementation, choose
from . import pallas_gpu, pallas_tpu, reference, xla
from .request import Request

IMPLEMENTATIONS: tuple[Implementation[Request], ...] = (pallas_gpu, pallas_tpu, xla, reference)
"""Every implementation, the preferred ones first."""


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G N D"],
    group_sizes: Int[Array, "Gall"],
    *,
    bias: Float[Array, "G N"] | None = None,
    group_offset: int | Int[Array, ""] = 0,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """rows[i] @ weights[g].T (+ bias[g]) for each row i of group g, accumulated in float32.

    Rows are sorted by group: the first `group_sizes[0]` belong to group 0, and so on. Rows past `sum(group_sizes)` belong to
    no group: what they hold is never read (it may be NaN), their result is zero and so is their gradient.

    Differentiable in `rows`, `weights` and `bias`.

    Args:
        rows: floating.
        weights: (out, in) matrices of G consecutive groups, of the same dtype, or float32: they are then rounded to the dtype
            of `rows`, and their gradient is float32, never rounded.
        group_sizes: rows per group, not negative, of at least G groups; their sum must not exceed M.
        bias: added to each row of its group, in float32.
        group_offset: which of the groups of `group_sizes` the first matrix of `weights` belongs to, when a device holds only
            the groups `[group_offset, group_offset + G)`. Rows of other groups are not computed; their result is zero, so
            results of all devices add up to the whole. An array outside `[0, Gall - G]` counts as the nearest offset that there
            is; an int is refused.
        preferred_element_type: dtype of the result; None: that of `rows`.
        implementation: "pallas_gpu", "pallas_tpu", "xla" or "reference"; None chooses by device and shape, see
            `explain_grouped_matmul`.

    Raises:
        ValueError: shapes that do not fit, an offset that is out of range, an unknown implementation.
        TypeError: dtypes other than those above, an offset that is not one integer.
        NotImplementedError: an implementation asked for by name cannot compute these arguments.
    """
    request = Request.of(rows, weights, group_sizes, bias, group_offset, preferred_element_type)
    chosen, _ = choose("grouped_matmul", IMPLEMENTATIONS, request, implementation)
    return chosen.run(request.equally_varying())


def explain_grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G N D"],
    group_sizes: Int[Array, "Gall"],
    *,
    bias: Float[Array, "G N"] | None = None,
    group_offset: int | Int[Array, ""] = 0,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> Choice:
    """What `grouped_matmul` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why.

    Names the implementation, its formulation with block sizes, and each rejected implementation with its reason. Raises
    what `grouped_matmul` raises.
    """
    request = Request.of(rows, weights, group_sizes, bias, group_offset, preferred_element_type)
    return choose("grouped_matmul", IMPLEMENTATIONS, request, implementation)[1]
