"""Barriers in memory, of which each slot of a ring has one: the use with number n, counted from 0, is that of slot n % slots."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .ref import Ref


def wait_for_last_uses(barriers: Ref, uses: Array, num_slots: int) -> None:
    """Wait at the barriers of the last uses of all slots: until then the block must not end, which would end the barriers.

    Other warpgroups may still be on their way to them, and Blackwell's tensor cores report to them on their own.
    """

    @pl.loop(jnp.maximum(uses - num_slots, 0), uses)
    def _(use):
        plgpu.barrier_wait(barriers.at[lax.rem(use, num_slots)])
