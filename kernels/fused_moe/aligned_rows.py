"""Where the rows of tokens lie for kernels, which want each expert's rows to begin at certain multiples, and the way back."""

from types import ModuleType
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..assignment import Assignment, inverse_of, names, sorted_by
from ..groups import Groups
from ..sum_of_choices import sum_of_choices
from ..varying import varying_like


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
        tokens_at_hand = None if window is None else TokensAtHand.of(position, is_local, most_rows, most_comparisons)
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
        if self.tokens_at_hand is not None:
            return self.tokens_at_hand.combine(rows)
        return sum_of_choices(rows, self.position, counts=self.is_local, dtype=jnp.float32)


class TokensAtHand(NamedTuple):
    """The tokens that have a row, those with most rows first, so that nothing is read for the others.

    Of U rows, at most U belong to the first local choices of tokens, U / 2 to the second ones, U / 3 to the third ones.
    """

    position: tuple[Int[Array, "U_k"], ...]
    """For each of K local choices: the rows of as many of these tokens as can have that many."""
    num_choices: Int[Array, "U"]
    """Local choices of each of these tokens; 0 for those at the end that have none."""
    place: Int[Array, "T"]
    """Where each token stands among them; U if it has no row."""

    @classmethod
    def of(
        cls, position: Int[Array, "T K"], is_local: Bool[Array, "T K"], most_rows: int, most_comparisons: int
    ) -> Self:
        """Sort the tokens, which have at most `most_rows` local choices together."""
        num_tokens, top_k = position.shape
        most_tokens = min(num_tokens, most_rows)
        num_choices = jnp.sum(is_local, axis=1, dtype=jnp.int32)
        token = sorted_by(top_k - num_choices, top_k)
        place = jnp.where(num_choices > 0, inverse_of(token, num_tokens, most_comparisons), most_tokens)
        number = jnp.cumsum(is_local, axis=1, dtype=jnp.int32)
        positions = []
        for choice in range(1, top_k + 1):
            row = jnp.sum(jnp.where(is_local & (number == choice), position, 0), axis=1, dtype=jnp.int32)
            positions.append(row[token[: min(num_tokens, most_rows // choice)]])
        return cls(tuple(positions), num_choices[token[:most_tokens]], place)

    def combine(self, rows: Float[Array, "M H"]) -> Float[Array, "T H"]:
        """Sum of each token's rows in float32, in the order of its choices."""
        # One row more stays zero, for tokens that have none.
        num_choices = jnp.pad(self.num_choices, (0, 1))
        total = jnp.zeros((), jnp.float32)
        for choice, position in enumerate(self.position):
            # Padded before it is converted and masked: XLA reads it in the same pass as the others then.
            row = jnp.pad(rows[position], ((0, num_choices.shape[0] - position.shape[0]), (0, 0)))
            total = total + jnp.where(num_choices[:, None] > choice, row.astype(jnp.float32), 0)
        return total[self.place]


def _target(position: Int[Array, "T K"], is_local: Bool[Array, "T K"], num_rows: int) -> Int[Array, "T*K"]:
    """Row of each pair; `num_rows` for pairs without a local expert."""
    return jnp.where(is_local, position, num_rows).reshape(-1)
