"""The experts of one rank, on rows that other ranks send while earlier rows are being multiplied.

Runs on every rank of a mesh axis inside `jax.shard_map`. What moves, and when:

1. The first weights are on their way before anything else. Ranks then meet at a barrier: after it, every rank's buffers exist.
2. Every block of rows (`exchange.py`) is sent by remote DMA, in the order in which its owner computes experts,
   starting with another rank on every rank. Nothing waits for these copies until the kernel ends; a block for a rank's own
   expert is a local copy.
3. Experts are computed one after the other, a tile of rows at a time. Each has a semaphore that counts what arrived for it, so
   an expert waits for its own rows only, while those of later experts are in flight. Weights are streamed in blocks of I:
   gate/up and down of a block are multiplied while the next block is read, across tiles and experts. The next tile's rows are
   waited for, and read, before the last block of this one is multiplied.
4. The results of a tile leave by remote DMA directly from vector memory, for the very rows that their sources sent, while the
   next tile is computed: the buffer is needed again at the end of that one.
5. Ranks leave when they have all that they expect, all that they sent has left, and every rank has got so far. Without the
   last, a rank that exchanges nothing could enter the next call, and be counted twice at its barrier, before a slow rank enters
   this one.

No copy depends on another rank's progress past the first barrier, so ranks cannot wait for each other in a circle.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..activations import Activation
from ..fused_moe.expert_block import ExpertMatrices
from ..groups import Groups
from ..integers import in_32_bits
from ..mosaic_tpu.epilogue import activate
from ..mosaic_tpu.schedule import VisitTable
from .exchange import BLOCK_ALIGNMENT, Exchange
from .request import Axis
from .tiles import ExpertParallelTiles


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What the kernel is built for."""

    axis: Axis
    num_ranks: int
    num_local_experts: int
    num_blocks: int
    """Blocks of I per tile."""
    activation: Activation
    tiles: ExpertParallelTiles


@in_32_bits
def exchange_and_compute(
    rows: Float[Array, "sent H"],
    weights: ExpertMatrices,
    exchange: Exchange,
    *,
    num_received: int,
    axis: Axis,
    activation: Activation,
    tiles: ExpertParallelTiles,
    vmem_limit_bytes: int,
    collective_id: int,
) -> Float[Array, "sent H"]:
    """The output of its expert for every row that this rank sends, at the row's own place; padding rows hold anything.

    Args:
        rows: in blocks, as `exchange` says; bfloat16 or float32.
        weights: of this rank's experts, or of several layers'; matrices of the dtype of `rows`. H and I are multiples of 128.
        exchange: what goes where.
        num_received: rows of the buffer for what this rank receives: enough for any routing.
        axis: name of the mesh axis, or names of several, over which experts are split.
        activation: between the projections.
        tiles: tile sizes.
        vmem_limit_bytes: vector memory that the kernel may use.
        collective_id: of the barrier; must differ from that of any other kernel that may run meanwhile on another rank.
    """
    _, projections, intermediate, hidden = weights.gate_up_proj.shape
    num_local, num_ranks = exchange.receive_rows.shape
    num_blocks = intermediate // tiles.intermediate
    groups = Groups(exchange.receive_start[:, 0], jnp.sum(exchange.receive_rows, axis=1, dtype=jnp.int32))
    visits = VisitTable.of(groups, num_received, tiles.rows, first_matrix=weights.start)
    problem = _Problem(axis, num_ranks, num_local, num_blocks, activation, tiles)

    def bias_or_zero(bias: Array | None, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, jnp.float32) if bias is None else bias.astype(jnp.float32)

    gate_up_bias = bias_or_zero(weights.gate_up_bias, (num_local, projections, intermediate))
    gate_up_bias = gate_up_bias.reshape(num_local, projections, num_blocks, tiles.intermediate).swapaxes(1, 2)
    down_bias = bias_or_zero(weights.down_bias, (num_local, hidden))[:, None]
    tables = *exchange, visits.group, visits.row, visits.last, visits.count, visits.first_matrix
    scalars = [table.reshape(-1) for table in tables]
    operands = (rows, weights.gate_up_proj, weights.down_proj, gate_up_bias, down_bias)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    results, _ = pl.pallas_call(
        lambda *refs: _kernel(problem, refs),
        out_shape=(
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct((num_received, hidden), rows.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            in_specs=[anywhere] * len(operands),
            out_specs=(anywhere, anywhere),
            scratch_shapes=[
                pltpu.VMEM((2, tiles.rows, hidden), rows.dtype),
                pltpu.VMEM((tiles.rows, hidden), jnp.float32),
                pltpu.VMEM((2, projections, tiles.intermediate, hidden), rows.dtype),
                pltpu.VMEM((2, hidden, tiles.intermediate), rows.dtype),
                pltpu.VMEM((2, projections, tiles.intermediate), jnp.float32),
                pltpu.VMEM((2, 1, hidden), jnp.float32),
                pltpu.SemaphoreType.DMA((num_ranks,)),
                pltpu.SemaphoreType.DMA((num_local,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((num_ranks,)),
                pltpu.SemaphoreType.REGULAR,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_limit_bytes, collective_id=collective_id if num_ranks > 1 else None
        ),
        name="expert_parallel",
    )(*scalars, *operands)
    return results


class _Memory:
    """The kernel's operands, buffers and semaphores, by name."""

    def __init__(self, refs):
        (
            # scalar memory
            self.send_start,
            self.send_rows,
            self.send_target,
            self.receive_start,
            self.receive_rows,
            self.return_target,
            self.expert,  # of each visit
            self.row,
            self.num_rows,
            self.num_visits,
            self.first_matrix,  # of those of this layer's experts
            # device memory
            self.sent,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_bias,
            self.down_bias,
            self.results,
            self.received,
            # vector memory
            self.tile,
            self.total,
            self.gate_up_block,
            self.down_block,
            self.gate_up_bias_block,
            self.down_bias_block,
            # semaphores
            self.sent_to,  # by rank
            self.arrived_for,  # by expert
            self.weights_read,  # by slot
            self.tile_read,  # by slot
            self.tile_returned,  # by slot
            self.returned_by,  # by rank
            self.ranks_done,
        ) = refs


def _kernel(problem: _Problem, refs) -> None:
    memory = _Memory(refs)
    weights = _WeightStream(problem, memory)
    tiles = _TileStream(problem, memory)
    num_visits = memory.num_visits[0]
    pl.when(num_visits > 0)(lambda: weights.start(0, 0, 0))
    _meet_other_ranks(problem)
    _send_rows(problem, memory)
    pl.when(num_visits > 0)(lambda: tiles.start(0))

    @pl.loop(0, num_visits)
    def _(visit):
        tiles.wait(visit)

        @pl.loop(0, problem.num_blocks)
        def _(block):
            step = visit * problem.num_blocks + block
            is_last = block == problem.num_blocks - 1
            next_visit = jnp.where(is_last, visit + 1, visit)

            @pl.when(next_visit < num_visits)
            def _():
                weights.start(next_visit, jnp.where(is_last, 0, block + 1), step + 1)

            @pl.when(is_last & (next_visit < num_visits))
            def _():
                pl.when(visit > 0)(lambda: tiles.wait_returned(visit - 1))
                tiles.start(visit + 1)

            weights.wait(step)
            pl.when(block == 0)(lambda: _start_total(memory, visit, step))
            _add_block(problem, memory, visit, step)

        tiles.store_total(visit)
        tiles.start_return(visit)

    for visit in (num_visits - 2, num_visits - 1):
        pl.when(visit >= 0)(lambda visit=visit: tiles.wait_returned(visit))
    _wait_for_results(problem, memory)
    _wait_for_other_ranks(problem, memory)


def _meet_other_ranks(problem: _Problem) -> None:
    if problem.num_ranks == 1:
        return
    barrier = pltpu.get_barrier_semaphore()
    for rank in _other_ranks(problem):
        pl.semaphore_signal(barrier, device_id={problem.axis: rank})
    pl.semaphore_wait(barrier, problem.num_ranks - 1)


def _wait_for_other_ranks(problem: _Problem, memory: _Memory) -> None:
    if problem.num_ranks == 1:
        return
    for rank in _other_ranks(problem):
        pl.semaphore_signal(memory.ranks_done, device_id={problem.axis: rank})
    pl.semaphore_wait(memory.ranks_done, problem.num_ranks - 1)


def _other_ranks(problem: _Problem) -> Iterator[Array]:
    """The other ranks, each rank beginning with the one after itself."""
    for distance in range(1, problem.num_ranks):
        yield lax.rem(lax.axis_index(problem.axis) + distance, problem.num_ranks)


def _send_rows(problem: _Problem, memory: _Memory) -> None:
    """Start to send every block to its expert's owner, experts that are computed first first."""
    this_rank = lax.axis_index(problem.axis)

    @pl.loop(0, problem.num_local_experts)
    def _(local_expert):
        arrived = memory.arrived_for.at[local_expert]

        def block_of(rank):
            expert = rank * problem.num_local_experts + local_expert
            num_rows = memory.send_rows[expert]
            source = memory.sent.at[_aligned(memory.send_start[expert], num_rows)]
            return num_rows, source, memory.received.at[_aligned(memory.send_target[expert], num_rows)]

        for rank in _other_ranks(problem):
            num_rows, source, target = block_of(rank)
            copy = pltpu.make_async_remote_copy(
                source, target, memory.sent_to.at[rank], arrived, device_id={problem.axis: rank}
            )
            pl.when(num_rows > 0)(copy.start)
        num_rows, source, target = block_of(this_rank)
        pl.when(num_rows > 0)(pltpu.make_async_copy(source, target, arrived).start)


def _wait_for_results(problem: _Problem, memory: _Memory) -> None:
    """Wait until other ranks have this rank's rows, and their results have come back."""
    for rank in _other_ranks(problem):
        first, last = rank * problem.num_local_experts, (rank + 1) * problem.num_local_experts - 1
        start = memory.send_start[first]
        num_rows = memory.send_start[last] + memory.send_rows[last] - start
        blocks = _aligned(start, num_rows)
        _wait(memory.sent.at[blocks], memory.sent_to.at[rank], num_rows)
        _wait(memory.results.at[blocks], memory.returned_by.at[rank], num_rows)


class _WeightStream:
    """Blocks of weights on their way to vector memory, one ahead of the one that is multiplied with."""

    def __init__(self, problem: _Problem, memory: _Memory):
        self.problem, self.memory = problem, memory

    def start(self, visit, block, step) -> None:
        """Start to read the weights of a visit's expert for a block of I, into the slot of this step."""
        for copy in self._copies(self.memory.expert[visit], block, step):
            copy.start()

    def wait(self, step) -> None:
        """Wait for the weights of a step."""
        for copy in self._copies(0, 0, step):
            copy.wait()

    def _copies(self, expert, block, step):
        memory, slot = self.memory, lax.rem(step, 2)
        width = self.problem.tiles.intermediate
        part = pl.ds(pl.multiple_of(block * width, width), width)
        matrix = memory.first_matrix[0] + expert
        pairs = (
            (memory.gate_up_proj.at[matrix, :, part, :], memory.gate_up_block),
            (memory.down_proj.at[matrix, :, part], memory.down_block),
            (memory.gate_up_bias.at[expert, block], memory.gate_up_bias_block),
            (memory.down_bias.at[expert], memory.down_bias_block),
        )
        read = memory.weights_read.at[slot]
        return [pltpu.make_async_copy(source, target.at[slot], read) for source, target in pairs]


class _TileStream:
    """Tiles of received rows on their way to vector memory, and their results on the way back to the sources."""

    def __init__(self, problem: _Problem, memory: _Memory):
        self.problem, self.memory = problem, memory

    def start(self, visit) -> None:
        """Start to read a visit's rows; if it is the first of its expert, wait until these have arrived."""
        memory = self.memory
        expert = memory.expert[visit]
        first_row = memory.receive_start[expert * self.problem.num_ranks]

        @pl.when(memory.row[visit] == first_row)
        def _():
            last = (expert + 1) * self.problem.num_ranks - 1
            num_rows = memory.receive_start[last] + memory.receive_rows[last] - first_row
            _wait(memory.received.at[_aligned(first_row, num_rows)], memory.arrived_for.at[expert], num_rows)

        self._read(visit).start()

    def wait(self, visit) -> None:
        """Wait for a visit's rows."""
        self._read(visit).wait()

    def _read(self, visit):
        memory, slot = self.memory, lax.rem(visit, 2)
        source = memory.received.at[_aligned(memory.row[visit], memory.num_rows[visit])]
        return pltpu.make_async_copy(source, self._rows(visit), memory.tile_read.at[slot])

    def store_total(self, visit) -> None:
        """Round the accumulated results and put them in the place of the rows."""
        memory, slot = self.memory, lax.rem(visit, 2)

        @pl.loop(0, memory.num_rows[visit] // BLOCK_ALIGNMENT)
        def _(index):
            rows = _aligned(index * BLOCK_ALIGNMENT, BLOCK_ALIGNMENT)
            memory.tile[slot, rows] = memory.total[rows].astype(memory.tile.dtype)

    def start_return(self, visit) -> None:
        """Start to send a visit's results to the ranks that sent the rows, a piece for each."""
        problem, memory, slot = self.problem, self.memory, lax.rem(visit, 2)
        this_rank = lax.axis_index(problem.axis)
        expert, begin = memory.expert[visit], memory.row[visit]
        end = begin + memory.num_rows[visit]
        returned = memory.tile_returned.at[slot]

        def piece_of(rank):
            entry = expert * problem.num_ranks + rank
            block_begin = memory.receive_start[entry]
            piece_begin = jnp.maximum(begin, block_begin)
            num_rows = jnp.minimum(end, block_begin + memory.receive_rows[entry]) - piece_begin
            source = memory.tile.at[slot, _aligned(piece_begin - begin, num_rows)]
            target = _aligned(memory.return_target[entry] + piece_begin - block_begin, num_rows)
            return num_rows, source, memory.results.at[target]

        for rank in _other_ranks(problem):
            num_rows, source, target = piece_of(rank)
            copy = pltpu.make_async_remote_copy(
                source, target, returned, memory.returned_by.at[this_rank], device_id={problem.axis: rank}
            )
            pl.when(num_rows > 0)(copy.start)
        num_rows, source, target = piece_of(this_rank)
        pl.when(num_rows > 0)(pltpu.make_async_copy(source, target, returned).start)

    def wait_returned(self, visit) -> None:
        """Wait until all results of a visit have left their slot."""
        memory = self.memory
        _wait(self._rows(visit), memory.tile_returned.at[lax.rem(visit, 2)], memory.num_rows[visit])

    def _rows(self, visit):
        return self.memory.tile.at[lax.rem(visit, 2), pl.ds(0, _multiple(self.memory.num_rows[visit]))]


def _start_total(memory: _Memory, visit, step) -> None:
    """Begin each row's sum with the bias of the down projection."""
    bias = memory.down_bias_block[lax.rem(step, 2)]

    @pl.loop(0, memory.num_rows[visit] // BLOCK_ALIGNMENT)
    def _(index):
        rows = _aligned(index * BLOCK_ALIGNMENT, BLOCK_ALIGNMENT)
        memory.total[rows] = jnp.broadcast_to(bias, (BLOCK_ALIGNMENT, bias.shape[1]))


def _add_block(problem: _Problem, memory: _Memory, visit, step) -> None:
    """Add what one block of I contributes to a tile's results."""
    tile_slot, slot = lax.rem(visit, 2), lax.rem(step, 2)
    tiles, hidden = problem.tiles, memory.tile.shape[2]

    def add(first, num_rows: int) -> None:
        rows = pl.ds(first, num_rows)
        x = memory.tile[tile_slot, rows]
        projected = [
            _times_transposed(x, memory.gate_up_block[slot, projection])
            + memory.gate_up_bias_block[slot, projection][None, :]
            for projection in range(memory.gate_up_block.shape[1])
        ]
        activated = activate(problem.activation, projected).astype(x.dtype)
        for column in range(0, hidden, tiles.strip):
            columns = pl.ds(column, tiles.strip)
            memory.total[rows, columns] += _times_transposed(activated, memory.down_block[slot, columns])

    _in_chunks(memory.num_rows[visit], tiles, add)


def _in_chunks(num_rows, tiles: ExpertParallelTiles, compute: Callable[[Array, int], None]) -> None:
    """Compute the first `num_rows` rows of a tile in chunks, the last one cut to a multiple of the step.

    Rows beyond the last are whatever an earlier tile left there. Nobody looks at their results.
    """
    chunk, step = tiles.chunk, tiles.step
    rounded = lax.div(num_rows + (step - 1), step) * step
    num_whole = lax.div(rounded, chunk)

    @pl.loop(0, num_whole)
    def _(index):
        compute(pl.multiple_of(index * chunk, chunk), chunk)

    for rest in range(step, chunk, step):
        pl.when(rounded - num_whole * chunk == rest)(
            lambda rest=rest: compute(pl.multiple_of(num_whole * chunk, chunk), rest)
        )


def _times_transposed(rows: Float[Array, "rows D"], matrix: Float[Array, "N D"]) -> Float[Array, "rows N"]:
    return lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _aligned(start, num_rows):
    return pl.ds(_multiple(start), _multiple(num_rows))


def _multiple(rows):
    return rows if isinstance(rows, int) else pl.multiple_of(rows, BLOCK_ALIGNMENT)


def _wait(rows, semaphore, num_rows) -> None:
    """Wait until copies of as many bytes as these rows have were counted."""
    pl.when(num_rows > 0)(pltpu.make_async_copy(rows, rows, semaphore).wait)
