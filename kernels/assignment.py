"""Which rows go to which expert: the pairs of a token and a choice, sorted by expert, and the inverse of the sort."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .groups import Groups
from .pair_rows import PairRows

MOST_COMPARISONS = {"cpu": 0, "gpu": 2**24, "tpu": 2**20}
"""By platform: so many comparisons of all with all take less time than a sort or a scatter. They are one kernel on a GPU, whose
multiprocessors make 2**24 in the time of about two launches; a sort and a scatter are several."""


class Assignment(NamedTuple):
    """The N = T * K pairs, sorted by expert, those without a local expert last."""

    pair: Int[Array, "N"]
    """Pair (token * K + choice) of each sorted row."""
    position: Int[Array, "T K"]
    """Sorted row of each pair: the inverse of `pair`."""
    expert: Int[Array, "T K"]
    """Local expert of each pair; E for pairs without one."""
    groups: Groups
    """Rows of each local expert."""

    @classmethod
    def of(
        cls, topk_ids: Int[Array, "T K"], expert_offset: int | Array, num_experts: int, *, most_comparisons: int = 0
    ) -> Self:
        """Sort pairs by local expert, keeping the order of tokens within an expert.

        Few pairs are sorted by comparing all with all, if that takes no more than `most_comparisons`.
        """
        num_pairs = topk_ids.size
        local = topk_ids.astype(jnp.int32) - jnp.asarray(expert_offset, jnp.int32)
        # Negative numbers become large ones.
        expert = jnp.minimum(local.astype(jnp.uint32), num_experts).astype(jnp.int32)
        order = expert.reshape(-1) * num_pairs + jnp.arange(num_pairs, dtype=jnp.int32)
        if num_pairs**2 <= most_comparisons and num_pairs * (num_experts + 1) < 2**31:
            position = jnp.sum(order[None, :] < order[:, None], axis=1, dtype=jnp.int32)
            pair = inverse_of(position, num_pairs, most_comparisons)
        else:
            pair = sorted_by(expert.reshape(-1), num_experts)
            position = inverse_of(pair, num_pairs, most_comparisons)
        sizes = jnp.sum(expert.reshape(1, -1) == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
        return cls(pair, position.reshape(topk_ids.shape), expert, Groups.of(sizes, 0, num_experts))

    @property
    def rows(self) -> PairRows:
        """The sorted rows, one for each pair."""
        return PairRows(self.pair, self.position)

    def is_local(self, num_experts: int) -> Bool[Array, "T K"]:
        """Whether a pair's expert is one of those whose weights are here."""
        return self.expert < num_experts


def inverse_of(target: Int[Array, "N"], size: int, most_comparisons: int) -> Int[Array, "size"]:
    """Which entry of `target` names each of 0, 1 … size - 1; -1 for those that none names. Entries beyond `size` don't count."""
    source = jnp.arange(target.shape[0], dtype=jnp.int32)
    if target.shape[0] * size <= most_comparisons:
        return jnp.max(jnp.where(names(target, size), source, -1), axis=1, initial=-1)
    return jnp.full(size, -1, jnp.int32).at[target].set(source, mode="drop", unique_indices=True)


def names(target: Int[Array, "N"], size: int) -> Bool[Array, "size N"]:
    """Whether an entry of `target` names each of 0, 1 … size - 1."""
    return target[None, :] == jnp.arange(size, dtype=jnp.int32)[:, None]


def sorted_by(key: Int[Array, "N"], largest: int) -> Int[Array, "N"]:
    """0, 1 … N - 1 in the order of their keys, equal ones as they are; keys are in [0, largest]."""
    size = key.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    if size * (largest + 1) < 2**31:
        # One sort of plain integers that carry both: on CPUs several times faster than a sort of two operands. No two are equal;
        # for a stable sort XLA would add an operand on GPUs.
        return jnp.sort(key * size + index, stable=False) % size
    return jax.lax.sort((key, index), num_keys=1, is_stable=True)[1]
