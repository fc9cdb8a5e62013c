"""Moving experts between devices, slot by slot, without ever holding more than one layer's local experts twice.

`weights[source]`, left to the compiler, gathers the experts of all ranks on every one of them. Here each rank fetches
one row at a time, into memory of one row, from whichever rank has it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from moe_jax.device_layouts import format_of
from moe_jax.parallel import axis_tuple


class ExpertSharding(NamedTuple):
    """How an array of experts, `[L, P, ...]` or `[P, ...]`, is split over devices: hashable, so it may be static."""

    mesh: Mesh | None
    """None: the array isn't split."""
    spec: PartitionSpec
    """One entry per dimension, or fewer."""
    is_stacked: bool
    """There is a leading axis of layers, before that of experts."""

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the experts are split."""
        dimension = int(self.is_stacked)
        entry: Any = self.spec[dimension] if len(self.spec) > dimension else None
        return () if self.mesh is None else axis_tuple(entry)

    @property
    def num_ranks(self) -> int:
        """Positions along those axes."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.expert_axes)

    @classmethod
    def of(cls, array: Array, *, is_stacked: bool) -> "ExpertSharding":
        """The sharding of an array that exists."""
        sharding = array.sharding
        if isinstance(sharding, NamedSharding):
            return cls(sharding.mesh, sharding.spec, is_stacked)  # pyright: ignore[reportArgumentType]
        return cls(None, PartitionSpec(), is_stacked)


def on_every_rank(function: Any, sharding: ExpertSharding) -> Any:
    """`function(local [L, S, ...], *tables)` run by every rank on its part of an array split as `sharding` says."""

    def on_rank(local, *tables):
        return function(local, *tables) if sharding.is_stacked else function(local[None], *tables)[0]

    if sharding.mesh is None:
        return on_rank

    def run(array, *tables):
        specs = (sharding.spec, *[PartitionSpec()] * len(tables))
        is_in_context = not jax.sharding.get_abstract_mesh().empty
        mesh = None if is_in_context else sharding.mesh
        return jax.shard_map(on_rank, mesh=mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)(
            array, *tables
        )

    return run


def move_experts(
    experts: Shaped[Array, "L P ..."] | Shaped[Array, "P ..."], source: Int[Array, "L P"], *, sharding: ExpertSharding
) -> Array:
    """`experts[l, source[l, p]]` for every slot p of every layer l, moved between ranks; for use in `jax.jit`.

    Donate `experts`: the result then takes its place, and beside it there is one layer's share of this rank, and a row.
    `source` is data, so another placement doesn't compile anything anew.
    """
    ranks, axes = sharding.num_ranks, sharding.expert_axes
    platform = None if sharding.mesh is None else sharding.mesh.devices.flat[0].platform

    def move(local, source):
        slots = local.shape[1]
        rank = jax.lax.axis_index(axes) if axes else 0
        source_rank, source_slot = jnp.divmod(source.reshape(-1, ranks, slots), slots)

        def move_slot(slot, carry):
            layer, old, local = carry
            wanted_rank, wanted_slot = source_rank[layer, :, slot], source_slot[layer, :, slot]  # of every receiver
            row = jax.lax.dynamic_slice_in_dim(old, wanted_slot[rank], 1)
            if ranks > 1:
                fetch = functools.partial(fetch_row, axes=axes, platform=platform)
                # The tables are the same on all ranks, so all of them take part in a collective, or none.
                is_fetched = (wanted_rank != jnp.arange(ranks)).any()
                row = jax.lax.cond(is_fetched, fetch, _keep_row, old, row, wanted_rank, wanted_slot, rank)
            at = (layer, slot, *[0] * (local.ndim - 2))
            return layer, old, jax.lax.dynamic_update_slice(local, row[None], at)

        def move_layer(layer, local):
            old = jax.lax.dynamic_index_in_dim(local, layer, keepdims=False)
            return jax.lax.fori_loop(0, slots, move_slot, (layer, old, local))[2]

        return jax.lax.fori_loop(0, local.shape[0], move_layer, local)

    return on_every_rank(move, sharding)(experts, source)


def _keep_row(_old: Array, row: Array, *_tables: Array) -> Array:
    """What `fetch_row` does where no rank wants a row of another one."""
    return row


def fetch_row(
    old: Shaped[Array, "S ..."],
    row: Shaped[Array, "1 ..."],
    wanted_rank: Int[Array, "D"],
    wanted_slot: Int[Array, "D"],
    rank: Int[Array, ""],
    *,
    axes: tuple[str, ...],
    platform: str | None,
) -> Shaped[Array, "1 ..."]:
    """The row of `old` that this rank wants from another one; `row` where it wants its own."""
    if platform == "cpu":
        return _fetch_row_by_sums(old, row, wanted_rank, wanted_slot, rank, axes)
    ranks = jnp.arange(len(wanted_rank))
    sends = (wanted_rank == rank) & (ranks != rank)
    receives = (wanted_rank[rank] == ranks) & (ranks != rank)
    zeros = jnp.zeros_like(wanted_slot)
    return jax.lax.ragged_all_to_all(
        old,
        row,
        jnp.where(sends, wanted_slot, zeros),
        sends.astype(zeros.dtype),
        zeros,
        receives.astype(zeros.dtype),
        axis_name=axes,
    )


def _fetch_row_by_sums(old, row, wanted_rank, wanted_slot, rank, axes):
    """The same for CPUs, where XLA has no ragged all-to-all: one receiver after the other, from equal offsets.

    Every rank but the sender adds zeros; the sum is one of bits, so that any number arrives unchanged.
    """
    bits = jnp.dtype(f"uint{8 * row.dtype.itemsize}")
    summed = jnp.promote_types(bits, jnp.uint32)

    def serve(receiver, row):
        sent = jax.lax.dynamic_slice_in_dim(old, wanted_slot[receiver], 1)
        sent = jax.lax.bitcast_convert_type(sent, bits).astype(summed)
        total = jax.lax.psum(jnp.where(wanted_rank[receiver] == rank, sent, 0), axes)
        return jnp.where(receiver == rank, jax.lax.bitcast_convert_type(total.astype(bits), row.dtype), row)

    return jax.lax.fori_loop(0, len(wanted_rank), serve, row)


def move_in_place(
    arrays: tuple[Array, ...],
    sources: tuple[Int[Array | np.ndarray, "L P"], ...],
    *,
    shardings: tuple[ExpertSharding, ...],
) -> tuple[Array, ...]:
    """`move_experts` of several arrays, which are given up for the results; these lie in memory as the arrays did."""
    return jitted_move(shardings, tuple(map(format_of, arrays)))(arrays, sources)


@functools.lru_cache(maxsize=64)
def jitted_move(shardings: tuple[ExpertSharding, ...], formats: tuple[Format | None, ...]) -> Any:
    """`move_in_place` for arrays with these shardings, whose results have these formats."""

    def move(arrays: tuple[Array, ...], sources: tuple[Int[Array, "L P"], ...]) -> tuple[Array, ...]:
        moves = zip(arrays, sources, shardings, strict=True)
        return tuple(move_experts(array, source, sharding=sharding) for array, source, sharding in moves)

    return jax.jit(move, donate_argnames="arrays", out_shardings=formats)
