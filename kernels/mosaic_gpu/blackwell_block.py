"""How a block of the Blackwell kernels is divided into parts that work at the same time, and how accumulators pass between them.

One warp copies and one multiplies; one warpgroup stores what the accumulators hold. While one of the accumulators is stored, the
next tile is multiplied into the other.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from .barriers import wait_for_last_uses
from .blackwell_memory import ACCUMULATORS
from .ref import Ref

STORING, MULTIPLYING = 0, 1  # warpgroups
_COPY_WARP, _MULTIPLY_WARP = 0, 1  # warps of the multiplying warpgroup


def run_in_warpgroup(warpgroup: int, part: Callable[[], None]) -> None:
    """Run a part of the block in one of its warpgroups."""
    pl.when(lax.axis_index("warpgroup") == warpgroup)(part)


def run_in_two_warps(copy: Callable[[], None], multiply: Callable[[], None]) -> None:
    """Run two parts of the block in one warp each."""

    def both() -> None:
        @plgpu.warp_map
        def _(warp):
            pl.when(warp == _COPY_WARP)(copy)
            pl.when(warp == _MULTIPLY_WARP)(multiply)

    run_in_warpgroup(MULTIPLYING, both)


def accumulator_scratch(rows: int, columns: int) -> dict[str, Any]:
    """Types of the accumulators, of `rows` x `columns` each, and of the barriers between what fills and what stores them."""
    return dict(
        accumulators=plgpu.TMEM((rows, ACCUMULATORS * columns), jnp.float32),
        multiplied=plgpu.Barrier(num_arrivals=1, num_barriers=ACCUMULATORS, orders_tensor_core=True),
        taken=plgpu.Barrier(num_arrivals=1, num_barriers=ACCUMULATORS, orders_tensor_core=True),
    )


def accumulator_of(multiplied: Array, columns: int, named: dict[str, Ref]) -> tuple[Ref, Array]:
    """The accumulator of a tile, and its index: they take turns. `multiplied` is how many tiles were multiplied before it."""
    which = lax.rem(multiplied, ACCUMULATORS)
    return named["accumulators"].at[:, pl.ds(which * columns, columns)], which


def take_chunk(
    accumulator: Ref, projections: int, index: Array, chunk: int, taken: Ref
) -> list[Float[Array, "rows chunk"]]:
    """A chunk of each projection's columns; the last one taken, the accumulator may be multiplied into again.

    Args:
        accumulator: one that is complete: the columns of all projections side by side.
        projections: how many.
        index: which chunk, in order.
        chunk: columns of a chunk, of each projection.
        taken: the barrier that says that the last one is taken.
    """
    columns, values = accumulator.shape[1] // projections, []
    for projection in range(projections):
        source = accumulator.at[:, pl.ds(projection * columns + index * chunk, chunk)]
        values.append(plgpu.async_load_tmem(source, layout=plgpu.Layout.TCGEN05))

    @pl.when(index == columns // chunk - 1)
    def _():
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(taken)

    return values


def wait_until_all_are_taken(multiplied: Array, named: dict[str, Ref]) -> None:
    """At the end of the warp that multiplies, whose block multiplied so many tiles."""
    wait_for_last_uses(named["taken"], multiplied, ACCUMULATORS)
