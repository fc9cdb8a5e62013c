"""Where the rows of tokens lie for kernels, which want each expert's rows to begin at certain multiples, and the way back."""

from types import ModuleType
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..groups import Groups
from ..varying import varying_like
from .assignment import Assignment, inverse_of, names


class AlignedRows(NamedTuple):
    """Where the pairs of tokens and experts lie in the aligned layout of M rows."""

    pair: Int[Array, "M"]
    """Pair (token * K + choice) of each row; -1 for padding and for rows of no expert."""
    position: Int[Array, "T K"]
    """Row of each pair; 0 for pairs without a local expert."""
    is_local: Bool[Array, "T K"]
    """Whether a pair's expert is here, and its row among these."""
    groups: Groups
    """Rows of each local expert."""
    tokens_at_hand: "TokensAtHand | None" = None
    """Which tokens have a row, where most have none."""

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        num_experts: int,
        schedule: ModuleType,
        most_comparisons: int,
        window: tuple[Int[Array, ""], int] | None = None,
    ) -> Self:
        """Move the sorted rows so that each expert's begin where `schedule`, that of the kernels, wants them.

        Rows find their pairs by comparing all with all, if that takes no more than `most_comparisons`. With a window, the first
        sorted row and how many there are, those outside of it are left out, as if they were not local.
        """
        starts, sizes = assignment.groups
        is_local = assignment.is_local(num_experts)
        most_rows = assignment.position.size
        if window is not None:
            first, most_rows = window
            ends = jnp.clip(starts + sizes, first, first + most_rows)
            starts = jnp.clip(starts, first, first + most_rows)
            sizes = ends - starts
            is_local &= (assignment.position >= first) & (assignment.position < first + most_rows)
        groups = schedule.aligned_groups(sizes)
        shift = (groups.starts - starts)[jnp.minimum(assignment.expert, num_experts - 1)]
        position = jnp.where(is_local, assignment.position + shift, 0)
        num_rows = schedule.aligned_num_rows(most_rows, num_experts)
        pair = inverse_of(_target(position, is_local, num_rows), num_rows, most_comparisons)
        tokens_at_hand = None if window is None else TokensAtHand.of(is_local, most_rows, most_comparisons)
        return cls(pair, position, is_local, groups, tokens_at_hand)

    @property
    def token(self) -> Int[Array, "M"]:
        """Token of each row; 0 for rows that are no pair's."""
        return jnp.maximum(self.pair, 0) // self.position.shape[1]

    def gather(self, x: Float[Array, "T H"]) -> Float[Array, "M H"]:
        """Each row's token; rows that are no pair's are token 0."""
        return x[self.token]

    def scatter(self, x: Float[Array, "T H"]) -> Float[Array, "M H"]:
        """Each row's token; rows that are no pair's are not written and hold anything, NaN too."""
        num_rows, top_k = self.pair.shape[0], self.position.shape[1]
        nothing = varying_like(jax.lax.empty((num_rows, x.shape[1]), x.dtype), x)
        target = _target(self.position, self.is_local, num_rows)
        return nothing.at[target].set(jnp.repeat(x, top_k, axis=0), mode="drop", unique_indices=True)

    def spread(self, values: Float[Array, "T K"], most_comparisons: int) -> Float[Array, "M"]:
        """Each row's value; zero for rows that are no pair's. Found in the same way as `pair`, and in the same kernel."""
        num_rows = self.pair.shape[0]
        if num_rows * values.size <= most_comparisons:
            named = names(_target(self.position, self.is_local, num_rows), num_rows)
            return jnp.sum(jnp.where(named, values.reshape(-1), 0), axis=1)
        return jnp.where(self.pair >= 0, values.reshape(-1)[jnp.maximum(self.pair, 0)], 0)

    def collect(self, values: Float[Array, "M"]) -> Float[Array, "T K"]:
        """Each pair's value; zero for pairs without a local expert."""
        return jnp.where(self.is_local, values[self.position], 0)

    def combine(self, rows: Float[Array, "M H"]) -> Float[Array, "T H"]:
        """Sum of each token's rows in float32, in the order of its choices."""
        if self.tokens_at_hand is None:
            return _sum_of_choices(rows, self.position, self.is_local)
        token = self.tokens_at_hand.token
        return self.tokens_at_hand.spread(_sum_of_choices(rows, self.position[token], self.is_local[token]))


class TokensAtHand(NamedTuple):
    """The at most U tokens that have a row, one after the other, so that nothing is summed for the others."""

    token: Int[Array, "U"]
    """Each of them, then any."""
    place: Int[Array, "T"]
    """Where each token stands among them; any for the others."""
    is_there: Bool[Array, "T"]
    """Whether a token is one of them."""

    @classmethod
    def of(cls, is_local: Bool[Array, "T K"], most_tokens: int, most_comparisons: int) -> Self:
        """The tokens with a local choice, of which there are at most `most_tokens`."""
        most_tokens = min(most_tokens, is_local.shape[0])
        is_there = jnp.any(is_local, axis=1)
        place = jnp.cumsum(is_there, dtype=jnp.int32) - 1
        token = inverse_of(jnp.where(is_there, place, most_tokens), most_tokens, most_comparisons)
        return cls(jnp.maximum(token, 0), jnp.maximum(place, 0), is_there)

    def spread(self, values: Float[Array, "U H"]) -> Float[Array, "T H"]:
        """Each token's value; zero for the others."""
        return jnp.where(self.is_there[:, None], values[self.place], 0)


def _sum_of_choices(
    rows: Float[Array, "M H"], position: Int[Array, "T K"], counts: Bool[Array, "T K"]
) -> Float[Array, "T H"]:
    """Sum in float32 of the rows at these positions, as far as they count, in the order of the choices."""
    total = jnp.zeros((), jnp.float32)
    for choice in range(position.shape[1]):
        row = rows[position[:, choice]].astype(jnp.float32)
        total = total + jnp.where(counts[:, choice, None], row, 0)
    return total


def _target(position: Int[Array, "T K"], is_local: Bool[Array, "T K"], num_rows: int) -> Int[Array, "T*K"]:
    """Row of each pair; `num_rows` for pairs without a local expert."""
    return jnp.where(is_local, position, num_rows).reshape(-1)
