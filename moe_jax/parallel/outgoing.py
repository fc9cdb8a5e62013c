"""The rows that an all-to-all strategy sends, and how results become those of tokens again."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel.dispatch import DispatchSettings
from moe_jax.parallel.sent_rows import SentRows, count_unserved, first_choices, merge_choices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChoices:
    """Which choices of a rank's tokens carry a row, and whereto."""

    topk_weights: Float[Array, "T K"]
    topk_ids: Int[Array, "T K"]
    owner: Int[Array, "T K"]
    """Rank that owns the expert; the number of ranks for ids that name none."""
    key: Int[Array, "T K"]
    """Choices of one token with the same key travel in one row: expert or owner. Of ids that name no expert, any."""
    carries: Bool[Array, "T K"]
    """Whether the row is this choice's: the first one of its key."""

    @classmethod
    def of(cls, settings: DispatchSettings, topk_weights: Float[Array, "T K"], topk_ids: Int[Array, "T K"]) -> Self:
        """Ids outside `[0, num_experts)` carry nothing."""
        is_expert = (topk_ids >= 0) & (topk_ids < settings.num_experts)
        owner = jnp.where(is_expert, topk_ids // settings.local_experts, settings.num_ranks)
        key = owner if settings.one_row_per_rank else topk_ids
        return cls(topk_weights, topk_ids, owner, key, first_choices(key) & is_expert)

    def weights_at_home(self, dtype: DTypeLike) -> Float[Array, "T K"]:
        """What the result of each choice's row counts, one row for each expert, in `dtype`."""
        return merge_choices(self.topk_weights.astype(dtype), self.key, self.carries)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outgoing:
    """Rows on their way, and what is kept to understand what returns."""

    rows: SentRows
    x: Float[Array, "R H"]
    """Tokens, multiplied by their weight if the experts' input is to be."""
    result_weights: Float[Array, "T K"]
    """What the result of each choice's row counts."""
    dropped_rows: Int[Array, ""]
    """Choices that found no room."""

    @classmethod
    def of(cls, settings: DispatchSettings, x: Float[Array, "T H"], choices: TokenChoices, rows: SentRows) -> Self:
        """Fetch the rows of `x`."""
        sent, wide = rows.gather(x), jnp.promote_types(x.dtype, jnp.float32)
        if settings.one_row_per_rank:
            result_weights = choices.carries.astype(wide)
        elif settings.weights_on_input:
            weights = rows.gather(choices.weights_at_home(wide))
            weights = jnp.take_along_axis(weights, (rows.pair % weights.shape[1])[:, None], axis=1)
            sent = (sent.astype(wide) * weights).astype(x.dtype)
            result_weights = choices.carries.astype(wide)
        else:
            result_weights = choices.weights_at_home(wide)
        is_valid = choices.owner < settings.num_ranks
        return cls(rows, sent, result_weights, count_unserved(choices.key, is_valid, rows.is_sent))

    def combine(self, results: Float[Array, "R H"]) -> Float[Array, "T H"]:
        """Results that lie where the rows lay, summed per token in float32 at least and rounded once."""
        return self.rows.combine(results, self.result_weights).astype(results.dtype)
