"""The expert-parallel MoE block by a TPU kernel with remote DMA: what it supports; `pallas_tpu_block.py` computes."""

import jax.numpy as jnp
from jax import Array

from ..selection import Formulation
from .exchange import most_rows_received, most_rows_sent
from .request import Request
from .tiles import ExpertParallelTiles, default_tiles

NAME = "pallas_tpu"
_LANES = 128


def unsupported(request: Request) -> str | None:
    """Devices that are no known TPU, dtypes other than bfloat16 and float32, `H` and `I` that are no multiples of 128."""
    block = request.block
    if block.tpu is None:
        return f"it needs a TPU v5e, v5p, v6e or 7x, the platform is {block.platform!r}"
    if block.x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"operands must be bfloat16 or float32, got {block.x.dtype}"
    for name, width in {"H": block.hidden_size, "I": block.intermediate_size}.items():
        if width % _LANES or not width:
            return f"{name} must be a positive multiple of {_LANES}, for copies to other chips, got {width}"
    try:
        tiles_for(request)
    except ValueError as error:
        return str(error)
    return None


def tiles_for(request: Request) -> ExpertParallelTiles:
    """The tile sizes that are used.

    Raises:
        ValueError: nothing fits into vector memory.
    """
    block = request.block
    return default_tiles(
        block.tpu,
        projections=block.projections,
        hidden=block.hidden_size,
        intermediate=block.intermediate_size,
        itemsize=block.x.dtype.itemsize,
        most_rows=most_rows_received(request.num_pairs, 1, request.num_ranks),
    )


def static_bytes(request: Request) -> dict[str, int]:
    """Device memory, in bytes, of what the kernel needs beside its operands, whatever the routing."""
    row_bytes = request.block.hidden_size * request.block.x.dtype.itemsize
    sent = most_rows_sent(request.num_pairs, request.num_experts) * row_bytes
    received = most_rows_received(request.num_pairs, request.block.num_experts, request.num_ranks) * row_bytes
    return {"rows sent": sent, "rows received": received, "results returned": sent}


def formulation(request: Request) -> Formulation:
    """Tiles, and the device memory of what is sent and received."""
    memory = ", ".join(f"{name} {size / 2**20:.4g} MiB" for name, size in static_bytes(request).items())
    return Formulation(
        f"rows and results by remote DMA while experts are computed, {tiles_for(request)}; {memory}",
        "rows move while others are multiplied, and none is dropped",
    )


def run(request: Request) -> Array:
    """Compute; differentiable in everything floating."""
    from .pallas_tpu_block import compute  # Pallas TPU takes a while to import

    if request.block.x.size == 0:
        return jnp.zeros_like(request.block.x)
    return compute(request, tiles_for(request))
