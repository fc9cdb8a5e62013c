"""Remote DMA: a TPU kernel sends rows to the chips of their experts, and results back, while it multiplies other rows.

Dispatch, experts and the way back are one kernel, `moe_jax.kernels.expert_parallel_moe`. So nothing arrives before the experts
run, and everything happens in `combine`. The kernel's buffers have room for the worst case, every rank's rows on one rank.

Source: spec 6 (kernels that overlap dispatch with the experts' computation).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.kernels.activations import Activation
from moe_jax.kernels.expert_parallel import BLOCK_ALIGNMENT, explain_expert_parallel_moe
from moe_jax.parallel.dispatch import (
    DispatchRequest,
    DispatchSettings,
    LocalExperts,
    ReceivedRows,
    gather_tokens,
    no_rows,
    sum_and_scatter_tokens,
    tensor_exchanged,
)
from moe_jax.parallel.requirements import unsupported_all_to_all, unsupported_buffer, unsupported_capacity

NAME = "remote_dma"
SLICES_TOKENS = True
WHY_ONLY_BY_NAME = "its buffers have room for the worst case, and no chip has run its kernel yet"

_KERNEL = "pallas_tpu"


class OwnTokens(NamedTuple):
    """Tokens that are still here, and their choices."""

    x: Float[Array, "T H"]
    topk_weights: Float[Array, "T K"]
    topk_ids: Int[Array, "T K"]


def unsupported(request: DispatchRequest) -> str | None:
    """Options of other strategies, fused shared experts, another implementation by name, and what the kernel cannot do."""
    config, parallel = request.config, request.parallel
    reason = unsupported_all_to_all(request) or unsupported_capacity(request) or unsupported_buffer(request)
    if reason is not None:
        return reason
    if parallel.one_row_per_rank:
        return "it sends a row for each expert, so one_row_per_rank must be False, got True"
    if parallel.micro_batches > 1:
        return f"its kernel overlaps sending and computing itself, so micro_batches must be 1, got {parallel.micro_batches}"
    if config.num_fused_shared_experts:
        return "its kernel runs routed experts alone, so fuse_shared_experts must be False, got True"
    if config.implementation not in (None, _KERNEL):
        return f"it is a kernel of {_KERNEL!r}, so implementation must be that or None, got {config.implementation!r}"
    return _unsupported_by_kernel(request)


def _unsupported_by_kernel(request: DispatchRequest) -> str | None:
    config, settings = request.config, request.settings
    experts, hidden = settings.local_experts, config.hidden_size
    intermediate = config.intermediate_size // request.axes.size(request.axes.tensor)
    projections = 2 if Activation.of(config.activation).is_gated else 1
    tokens = request.sliced_tokens * request.axes.size(tensor_exchanged(request.axes))

    computes_in = config.param_dtype if config.dtype is None else config.dtype

    def shape(*sizes: int, dtype: Any = computes_in) -> Any:  # a shape stands where an array will
        return jax.ShapeDtypeStruct(sizes, dtype)

    choice = explain_expert_parallel_moe(
        shape(tokens, hidden),
        shape(tokens, request.top_k, dtype=jnp.float32),
        shape(tokens, request.top_k, dtype=jnp.int32),
        shape(experts, projections, intermediate, hidden),
        shape(experts, hidden, intermediate),
        num_ranks=settings.num_ranks,
        activation=config.activation,
    )
    return dict(choice.rejected).get(_KERNEL)


def rows_moved(request: DispatchRequest) -> float:
    """The blocks of rows for other ranks' experts, each padded to a multiple of 16 rows, twice."""
    settings = request.settings
    tokens = request.sliced_tokens * request.axes.size(tensor_exchanged(request.axes))
    others = settings.num_experts - settings.local_experts
    return 2 * others * _padded_rows(tokens * request.top_k / settings.num_experts) + request.rows_around_exchange()


def _padded_rows(mean: float) -> float:
    """Expected rows of a block, if the number of those that exist has a Poisson distribution with this mean."""
    if not mean:
        return 0.0
    number = np.arange(math.ceil(mean + 10 * math.sqrt(mean)) + BLOCK_ALIGNMENT)
    log_factorial = np.cumsum(np.log(np.maximum(number, 1)))
    at_most = np.cumsum(np.exp(number * math.log(mean) - mean - log_factorial))
    return BLOCK_ALIGNMENT * float(
        np.sum(1 - at_most[::BLOCK_ALIGNMENT])
    )  # 16 rows more whenever there are more than 0, 16, ...


def dispatch(
    settings: DispatchSettings, x: Float[Array, "T H"], topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]
) -> tuple[ReceivedRows, OwnTokens]:
    """Send nothing yet, but count what the kernel is going to send."""
    own = OwnTokens(*gather_tokens(tensor_exchanged(settings.axes), x, topk_weights, topk_ids))
    is_expert = (own.topk_ids >= 0) & (own.topk_ids < settings.num_experts)
    is_sent = is_expert & (own.topk_ids // settings.local_experts != settings.rank)
    received = ReceivedRows(
        x=own.x[:0],
        topk_weights=own.topk_weights[:0],
        topk_ids=own.topk_ids[:0],
        sent_rows=jnp.sum(is_sent, dtype=jnp.int32),
        dropped_rows=no_rows(),
        expected_rows=0,
    )
    return received, own


def send_back(settings: DispatchSettings, results: Float[Array, "0 H"], sent: OwnTokens) -> tuple[()]:
    """There is nothing to send back."""
    del settings, results, sent
    return ()


def combine(
    settings: DispatchSettings, returned: tuple[()], sent: OwnTokens, experts: LocalExperts, after: Any
) -> Float[Array, "T H"]:
    """Run the kernel, which returns the sums of each token's results."""
    del returned, after
    return sum_and_scatter_tokens(tensor_exchanged(settings.axes), experts.with_other_ranks(*sent))
