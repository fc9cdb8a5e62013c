"""Rows from every rank to every rank, as many as there are: XLA's ragged all-to-all, and its emulation on CPUs.

XLA has no ragged all-to-all for CPUs. There the same offsets and sizes drive an emulation of this one collective, so that
everything around it, and the offsets and sizes themselves, are executed by tests.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class RaggedOffsets(NamedTuple):
    """What one rank tells the collective: arguments of `jax.lax.ragged_all_to_all`, one entry for each other rank."""

    input_offsets: Int[Array, "ranks"]
    """First row of the block for each rank among the rows that are sent."""
    send_sizes: Int[Array, "ranks"]
    """Rows of that block."""
    output_offsets: Int[Array, "ranks"]
    """First row of that block among the rows that its receiver gets."""
    recv_sizes: Int[Array, "ranks"]
    """Rows of the block that each rank sends here."""


def forth_and_back(
    sizes: Int[Array, "ranks ranks"],
    rank: Int[Array, ""] | int,
    first_row: Int[Array, ""] | int = 0,
    num_rows: int | None = None,
) -> tuple[RaggedOffsets, RaggedOffsets]:
    """How rows travel, and how their results return to where they came from.

    Args:
        sizes: rows that each rank (first axis) sends to each; blocks lie one after the other on both sides, without gaps.
        rank: this rank.
        first_row: of the rows that each rank gets in all, those from this one on travel now, and arrive at the front.
        num_rows: at most so many of them (None: all).
    """
    at_sender = jnp.cumsum(sizes, axis=1) - sizes
    at_receiver = jnp.cumsum(sizes, axis=0) - sizes - first_row
    most = jnp.iinfo(sizes.dtype).max if num_rows is None else num_rows
    begin, end = jnp.clip(at_receiver, 0, most), jnp.clip(at_receiver + sizes, 0, most)
    at_sender, at_receiver, sizes = at_sender + begin - at_receiver, begin, end - begin
    at_sender = jnp.where(sizes > 0, at_sender, 0)
    forth = RaggedOffsets(at_sender[rank], sizes[rank], at_receiver[rank], sizes[:, rank])
    back = RaggedOffsets(at_receiver[:, rank], sizes[:, rank], at_sender[:, rank], sizes[rank])
    return forth, back


def exchange(
    rows: Array, forth: RaggedOffsets, back: RaggedOffsets, num_received: int, axis: tuple[str, ...], platform: str
) -> Array:
    """Send rows `[R, ...]` as `forth` says; `back` is the way in which gradients return. For use inside `jax.shard_map`.

    Returns:
        `[num_received, ...]` rows, zero where none arrived. The gradient is zero for rows that weren't sent.
    """
    return _exchange(rows, forth, back, (rows.shape[0], num_received), axis, platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchange(
    rows: Array,
    forth: RaggedOffsets,
    back: RaggedOffsets,
    num_rows: tuple[int, int],
    axis: tuple[str, ...],
    platform: str,
) -> Array:
    del back
    output = jnp.zeros((num_rows[1], *rows.shape[1:]), rows.dtype)
    collective = emulated_ragged_all_to_all if platform == "cpu" else jax.lax.ragged_all_to_all
    return collective(rows, output, *forth, axis_name=axis)


def _exchange_forward(rows, forth, back, num_rows, axis, platform):
    return _exchange(rows, forth, back, num_rows, axis, platform), (forth, back)


def _exchange_backward(num_rows, axis, platform, saved, cotangent):
    forth, back = saved
    return _exchange(cotangent, back, forth, num_rows[::-1], axis, platform), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def emulated_ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Int[Array, "ranks"],
    send_sizes: Int[Array, "ranks"],
    output_offsets: Int[Array, "ranks"],
    recv_sizes: Int[Array, "ranks"],
    *,
    axis_name: tuple[str, ...],
) -> Array:
    """`jax.lax.ragged_all_to_all` with one slice for each rank, from collectives that every platform has.

    Every rank gathers the operands of all, so this is for tests and small sizes.
    """
    del send_sizes  # the receiver's own count says the same
    operands = jax.lax.all_gather(operand, axis_name)
    from_rows = jax.lax.all_to_all(input_offsets, axis_name, 0, 0, tiled=True)
    to_rows = jax.lax.all_to_all(output_offsets, axis_name, 0, 0, tiled=True)
    row = jnp.arange(output.shape[0], dtype=jnp.int32)[:, None]
    arrives = (row >= to_rows) & (row < to_rows + recv_sizes)  # [received, ranks]
    source = jnp.argmax(arrives, axis=1)
    source_row = jnp.where(arrives.any(axis=1), row[:, 0] - to_rows[source] + from_rows[source], 0)
    arrived = operands[source, source_row]
    is_new = arrives.any(axis=1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(is_new, arrived, output)
