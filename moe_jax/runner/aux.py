"""What a layer's call reports beside its result."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
    """Routing of one call: arrays only, so that it leaves `jax.jit`, and `jax.lax.scan` stacked per layer.

    docs/layer.md has a table of the fields.
    """

    topk_ids: Int[Array, "... K"]
    """Logical expert ids, int32, as `forced_ids` takes them back: -1 no expert, num_experts and above zero experts."""
    topk_weights: Float[Array, "... K"]
    """float32 weights, scaled if the scaling plan says that the router scales."""
    router_logits: Float[Array, "... E"]
    """Logits before scoring; zero experts have theirs behind those of the E experts."""
    expert_load: Int[Array, "E"]
    """Choices of each logical expert, int32; padding and zero experts are not counted."""
    physical_load: Int[Array, "P"]
    """The same per physical expert, int32: the slots that hold a copy share its expert's load (spec 5.7)."""
    dropped_rows: Int[Array, ""]
    """Choices for whose row no rank had room; 0 unless the dispatch strategy has a capacity."""
    sent_rows: Int[Array, "ranks"]
    """Rows of hidden states that each rank with tokens of its own has sent to ranks that own experts, itself excepted. Ranks that
    hold the same tokens and different slices of the experts send alike; they count as one. Where no rank sends rows to another
    (`replicated`, `allgather_reducescatter`) there is one entry, 0."""


def count_expert_load(topk_ids: Int[Array, "T K"], num_experts: int) -> Int[Array, "E"]:
    """How often each of `num_experts` experts was chosen; other ids are not counted."""
    # A comparison with every expert rather than a scatter: it keeps its sharding under any mesh, and XLA fuses it.
    return jnp.sum(topk_ids.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
