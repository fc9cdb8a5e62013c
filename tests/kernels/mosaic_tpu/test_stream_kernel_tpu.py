"""Few rows times weights on TPUs: the kernel, interpreted, against float64; and the choice of its tiles."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support.rounding import ROUNDED_ONCE
from support.tpu_interpretation import interpreting_tpu

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels.activations import Activation
from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_tpu import stream_kernel
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable
from moe_jax.kernels.mosaic_tpu.stream_kernel import stream_weights
from moe_jax.kernels.mosaic_tpu.stream_tiles import BYTES_IN_FLIGHT, StreamShape, StreamTiles, default_stream_tiles

TILES = StreamTiles(rows=32, columns=128, slots=3)
SIZES = (1, 0, 3, 17, 0, 40, 0, 2)
"""Groups that share 16 rows, groups without rows, one of each size, one of several visits."""


@dataclasses.dataclass
class Problem:
    """Random operands, with NaN where nothing may be read: in rows of no group, and in weights of groups without rows."""

    rows: jnp.ndarray
    weights: jnp.ndarray
    bias: jnp.ndarray
    row_scale: jnp.ndarray
    groups: Groups

    @classmethod
    def draw(cls, rng, sizes, start, num_rows, projections, width_out, width_in, dtype):
        sizes = np.array(sizes)
        ends = start + np.cumsum(sizes)
        rows = rng.standard_normal((num_rows, width_in))
        rows[:start] = rows[ends[-1] :] = np.nan
        weights = rng.standard_normal((len(sizes), projections, width_out, width_in)) / np.sqrt(width_in)
        weights[sizes == 0] = np.nan
        bias, row_scale = rng.standard_normal(weights.shape[:3]), rng.standard_normal(num_rows)
        groups = Groups(jnp.array(ends - sizes, jnp.int32), jnp.array(sizes, jnp.int32))
        return cls(*(jnp.array(operand, dtype) for operand in (rows, weights, bias)), jnp.array(row_scale), groups)

    def computed(self, tiles=TILES, *, device="v6e", output_dtype=jnp.float32, padding=0, **options):
        rows = jnp.pad(self.rows, ((0, 0), (0, padding)), constant_values=jnp.nan)
        table = VisitTable.of(self.groups, rows.shape[0], tiles.rows)
        device = TPU_DEVICES[device]
        return stream_weights(
            rows, self.weights, table, tiles=tiles, output_dtype=output_dtype, device=device, **options
        )

    def expected(self, finish=lambda projected, own: projected[0]):
        """Row numbers of the groups and their results in float64; `finish` gets the projections and the rows of a group."""
        numbers, results = [], []
        for group, (first, size) in enumerate(zip(*map(np.asarray, self.groups), strict=True)):
            own = slice(first, first + size)
            if size:
                numbers.extend(range(own.start, own.stop))
                results.append(finish(wide(self.weights[group]) @ wide(self.rows[own]).T, (group, own)).T)
        return numbers, np.concatenate(results)


def wide(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def assert_matches(result, expected, width):
    numbers, values = expected
    np.testing.assert_allclose(wide(result)[numbers, :width], values, rtol=ROUNDED_ONCE[result.dtype.name], atol=1e-5)


@pytest.mark.parametrize(
    ("dma", "dtype", "start"),
    [
        ("on_wait", jnp.bfloat16, 5),
        ("eager", jnp.float32, 0),
        pytest.param("eager", jnp.bfloat16, 5, marks=pytest.mark.slow),
        pytest.param("on_wait", jnp.float32, 0, marks=pytest.mark.slow),
    ],
)
def test_each_row_is_multiplied_by_its_groups_matrix(dma, dtype, start, rng):
    problem = Problem.draw(rng, SIZES, start, 80, 1, 256, 128, dtype)
    with interpreting_tpu(dma=dma):
        result = problem.computed(output_dtype=dtype)
    assert result.dtype == dtype
    assert_matches(result, problem.expected(), 256)


@pytest.mark.parametrize("device", [pytest.param("v6e", marks=pytest.mark.slow), "v5p"])
def test_bias_activation_and_scale_are_applied_before_rounding(device, rng):
    problem = Problem.draw(rng, (3, 0, 20), 2, 32, 2, 400, 200, jnp.bfloat16)
    with interpreting_tpu(device):
        result = problem.computed(
            device=device,
            output_dtype=jnp.bfloat16,
            padding=56,
            bias=problem.bias,
            activation=Activation("silu"),
            row_scale=problem.row_scale,
        )

    def finish(projected, own):
        group, rows = own
        gate, up = projected + wide(problem.bias[group])[:, :, None]
        return gate / (1 + np.exp(-gate)) * up * wide(problem.row_scale[rows])

    assert result.shape == (32, 512)
    assert_matches(result, problem.expected(finish), 400)


@pytest.mark.parametrize("slots", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_any_number_of_slots(slots, rng):
    problem = Problem.draw(rng, (1, 2, 0, 1), 0, 16, 1, 384, 128, jnp.float32)
    with interpreting_tpu():
        result = problem.computed(dataclasses.replace(TILES, rows=16, slots=slots))
    assert_matches(result, problem.expected(), 384)


def test_no_rows_need_no_weights(rng):
    problem = Problem.draw(rng, (1, 1), 0, 16, 1, 128, 128, jnp.float32)
    problem = dataclasses.replace(problem, groups=Groups(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32)))
    with interpreting_tpu():
        assert problem.computed(dataclasses.replace(TILES, rows=16)).shape == (16, 128)


class Wrapped:
    """A copy whose waits, or whose starts, are watched or left out."""

    def __init__(self, copy, on_start=None, waits=True):
        self._copy, self._on_start, self._waits = copy, on_start, waits

    def start(self):
        if self._on_start:
            self._on_start()
        self._copy.start()

    def wait(self):
        if self._waits:
            self._copy.wait()


def test_every_weight_of_a_group_with_rows_is_copied_once_and_no_other(rng, monkeypatch):
    copied = []
    new_copy = pltpu.make_async_copy

    def recorded(source, target, semaphore):
        def record():
            (index,) = source.transforms
            if len(index.shape) == 4:
                group, _, columns, _ = index.indices
                jax.debug.callback(lambda *place: copied.append(tuple(map(int, place))), group, columns.start)

        return Wrapped(new_copy(source, target, semaphore), record)

    monkeypatch.setattr(pltpu, "make_async_copy", recorded)
    problem = Problem.draw(rng, (1, 0, 20, 0, 2), 0, 32, 1, 384, 128, jnp.float32)
    with interpreting_tpu():
        problem.computed()
    assert sorted(copied) == list(itertools.product((0, 2, 4), (0, 128, 256)))


@pytest.mark.parametrize("forgotten", ["_weights_copies", "_rows_copies", "_store_copies"])
def test_a_wait_that_is_left_out_is_reported_as_a_race(forgotten, rng, monkeypatch):
    copies = getattr(stream_kernel._Kernel, forgotten)

    def unawaited(self, which, act):
        copies(self, which, lambda copy: act(Wrapped(copy, waits=False)))

    monkeypatch.setattr(stream_kernel._Kernel, forgotten, unawaited)
    problem = Problem.draw(rng, (20, 3, 30), 0, 64, 1, 256, 128, jnp.float32)
    with interpreting_tpu(dma="eager", checked=False) as interpretation:
        problem.computed(dataclasses.replace(TILES, rows=16))
    assert interpretation.num_racing == 1
    assert interpretation.semaphores_left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 48}, "rows of a tile must be a power of two from 16 on, got 48"),
        ({"columns": 64}, "columns of a tile must be a multiple of 128, got 64"),
        ({"slots": 1}, "slots must be at least 2, got 1"),
        ({"slots": 10_000}, "v6e has .* to give"),
    ],
)
def test_tiles_that_the_kernel_does_not_have_are_refused(changes, message, rng):
    problem = Problem.draw(rng, (1,), 0, 16, 1, 256, 128, jnp.float32)
    with pytest.raises(ValueError, match=message):
        problem.computed(dataclasses.replace(TILES, **changes))


def test_sizes_that_the_kernel_cannot_address_are_refused(rng):
    with pytest.raises(ValueError, match="multiple of 16 rows, got 120"):
        Problem.draw(rng, (1,), 0, 16, 1, 120, 128, jnp.float32).computed()
    with pytest.raises(ValueError, match="function of 2 projections, got 1"):
        Problem.draw(rng, (1,), 0, 16, 1, 128, 128, jnp.float32).computed(activation=Activation("silu"))


@pytest.mark.parametrize("device", TPU_DEVICES.values(), ids=TPU_DEVICES)
@pytest.mark.parametrize("shape", EXPERT_SHAPES.values(), ids=EXPERT_SHAPES)
def test_default_tiles_fit_published_shapes_and_keep_enough_in_flight(device, shape):
    gate_up = dict(width_in=shape.hidden_size, width_out=shape.intermediate_size, projections=2)
    down = dict(width_in=shape.intermediate_size, width_out=shape.hidden_size, projections=1)
    for sizes, num_rows in itertools.product((gate_up, down), (1, 64, 1024)):
        problem = StreamShape(**sizes, itemsize=2, output_itemsize=2)
        tiles = default_stream_tiles(num_rows, problem, device)
        assert problem.vmem_bytes(tiles, device) < device.vmem_bytes
        block_bytes = problem.projections * tiles.columns * problem.width_in * 2
        assert (tiles.slots - 1) * block_bytes >= BYTES_IN_FLIGHT / 2
        busiest_columns = problem.blocks_per_core(tiles, device) * tiles.columns
        assert busiest_columns * device.cores < 1.1 * problem.width_out


def test_rows_that_are_too_long_have_no_tiles():
    shape = StreamShape(width_in=2**20, width_out=128, projections=2, itemsize=2, output_itemsize=2)
    with pytest.raises(ValueError, match="no tiles for .* fit"):
        default_stream_tiles(1, shape, TPU_DEVICES["v5p"])
