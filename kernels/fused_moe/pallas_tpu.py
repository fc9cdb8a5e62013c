"""The fused MoE block by Pallas TPU kernels: what they support; `sorted_rows_block.py` computes."""

from jax import Array

from ..mosaic_tpu.choice import RowsProblem, row_too_long
from ..mosaic_tpu.limits import unsupported_device, unsupported_operands
from ..selection import Formulation
from . import sorted_rows_block
from .request import Request
from .rounds import RowsPerRound

NAME = "pallas_tpu"


def unsupported(request: Request) -> str | None:
    """Devices other than the TPUs that are known, dtypes other than bfloat16 and float32, rows that exceed vector memory."""
    reason = unsupported_device(request.tpu, request.platform) or unsupported_operands(x=request.x.dtype)
    if reason is not None:
        return reason
    # The gradients contract gate and up together.
    projections = request.projections
    num_rows = RowsPerRound.of(request, request.tpu.platform).with_gradient or request.topk_ids.size
    sizes = {
        "gate/up": (request.hidden_size, request.intermediate_size, projections),
        "down": (request.intermediate_size, request.hidden_size, 1),
        "gradient of gate/up": (projections * request.intermediate_size, request.hidden_size, 1),
    }
    itemsize = request.x.dtype.itemsize
    for name, (width_in, width_out, projections) in sizes.items():
        problem = RowsProblem(
            num_rows=request.expected_rows,
            num_groups=request.num_experts,
            width_in=width_in,
            width_out=width_out,
            projections=projections,
            kept=name == "gate/up",
            scaled_rows=num_rows if name == "down" else 0,
            itemsize=itemsize,
            output_itemsize=itemsize,
        )
        reason = row_too_long(problem, request.tpu)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def formulation(request: Request) -> Formulation:
    """Kernels and tiles of the forward pass."""
    from ..mosaic_tpu import matmuls  # Pallas TPU takes half a second to import

    return sorted_rows_block.formulation(request, matmuls, request.tpu)


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    from ..mosaic_tpu import matmuls

    return sorted_rows_block.run(request, matmuls, request.tpu)
