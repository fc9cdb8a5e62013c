"""Grouped matmul by Pallas TPU kernels: what they support; `sorted_rows_multiply.py` computes."""

from jax import Array

from ..mosaic_tpu.choice import RowsProblem, row_too_long
from ..mosaic_tpu.limits import unsupported_device, unsupported_operands
from ..selection import Formulation
from . import sorted_rows_multiply
from .request import Request

NAME = "pallas_tpu"


def unsupported(request: Request) -> str | None:
    """Devices other than the TPUs that are known, dtypes other than bfloat16 and float32, rows that exceed vector memory."""
    reason = unsupported_device(request.tpu, request.platform) or unsupported_operands(
        rows=request.rows.dtype, preferred_element_type=request.output_dtype
    )
    if reason is not None:
        return reason
    num_groups, width_out, width_in = request.weights.shape
    for contracted, kept in ((width_in, width_out), (width_out, width_in)):  # forwards, and the gradient of rows
        problem = RowsProblem(
            num_rows=request.rows.shape[0],
            num_groups=num_groups,
            width_in=contracted,
            width_out=kept,
            projections=1,
            itemsize=request.rows.dtype.itemsize,
            output_itemsize=request.output_dtype.itemsize,
        )
        reason = row_too_long(problem, request.tpu)
        if reason is not None:
            return reason
    return None


def formulation(request: Request) -> Formulation:
    """Kernel and tiles of the forward pass."""
    from ..mosaic_tpu import matmuls  # Pallas TPU takes half a second to import

    return sorted_rows_multiply.formulation(request, matmuls, request.tpu)


def run(request: Request) -> Array:
    """Multiply; differentiable in rows, weights and bias."""
    from ..mosaic_tpu import matmuls

    return sorted_rows_multiply.run(request, matmuls, request.tpu)
