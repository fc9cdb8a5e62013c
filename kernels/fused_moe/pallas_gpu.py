"""The fused MoE block by Mosaic GPU kernels, on Hopper and Blackwell: what they support; `sorted_rows_block.py` computes."""

from jax import Array

from ..mosaic_gpu.limits import unsupported_device, unsupported_operands
from ..selection import Formulation
from . import sorted_rows_block
from .request import Request

NAME = "pallas_gpu"


def unsupported(request: Request) -> str | None:
    """Devices other than Hopper and Blackwell, dtypes other than bfloat16 and float16, rows that no bulk copy can address."""
    return unsupported_device(request.gpu, request.platform) or unsupported_operands(
        request.x.dtype, H=request.hidden_size, I=request.intermediate_size
    )


def formulation(request: Request) -> Formulation:
    """Kernels and tiles of the forward pass."""
    from ..mosaic_gpu import matmuls  # Mosaic GPU takes half a second to import

    return sorted_rows_block.formulation(request, matmuls, request.gpu)


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    from ..mosaic_gpu import matmuls

    return sorted_rows_block.run(request, matmuls, request.gpu)
