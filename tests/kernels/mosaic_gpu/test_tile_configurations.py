"""Every tile configuration that is tuned, or chosen by default for a published model, computes the right thing without a race.

The tiles are executed as they are; the problem shrinks: three steps of the contracted dimension, a hot, an empty and an odd
group, several tiles per block. Configurations that differ in the panel alone are executed once, with a panel of two, since in a
problem of this size the larger ones are all the same.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_interpretation import interpreting
from support.rows_problems import SILU, RowsProblem, assert_rounded_once
from support.tile_configurations import TileConfiguration, tile_configurations

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels import fused_moe, grouped_matmul
from moe_jax.kernels.device import GPU_DEVICES, targeting
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu import matmuls
from moe_jax.kernels.mosaic_gpu.row_tiles import default_row_tiles
from moe_jax.kernels.mosaic_gpu.rows_product import multiply_rows
from moe_jax.kernels.mosaic_gpu.stream_kernel import stream_weights
from moe_jax.kernels.mosaic_gpu.tiles import StreamTiles
from moe_jax.kernels.mosaic_gpu.weights_gradient_product import weights_gradient

BLOCKS = 2
DEVICES = ("h200", "b200")
PANEL = 2


def as_executed(configuration):
    """The configuration with the panel that it is executed with."""
    if isinstance(configuration.tiles, StreamTiles):
        return configuration
    return dataclasses.replace(configuration, tiles=dataclasses.replace(configuration.tiles, panel=PANEL))


EXECUTED = list(dict.fromkeys(as_executed(each) for device in DEVICES for each in tile_configurations(device)))
SAMPLED = ("h200-rows-2-", "h200-stream-2-")
"""`make test` executes the first configuration of each of these kernels."""


def parameters():
    first_of_each = {next(each for each in EXECUTED if str(each).startswith(start)) for start in SAMPLED}
    return [
        pytest.param(each, id=str(each), marks=[] if each in first_of_each else [pytest.mark.slow]) for each in EXECUTED
    ]


@pytest.fixture(scope="module")
def executed(request):
    """Counts configurations, and says in the end how many there were."""
    done = []
    yield done
    line = f"{len(done)} of {len(EXECUTED)} tile configurations were executed, of {', '.join(DEVICES)}"
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    (reporter.write_line if reporter else print)(f"\n{line}")


@pytest.mark.parametrize("configuration", parameters())
def test_configuration_is_right_without_a_race(configuration, executed, rng):
    device = dataclasses.replace(GPU_DEVICES[configuration.device], multiprocessors=BLOCKS)
    check = {
        "rows": check_rows,
        "rows_gradient": check_rows,
        "stream": check_stream,
        "weights_gradient": check_weights_gradient,
    }
    with interpreting(BLOCKS, configuration.device) as interpretation:
        check[configuration.kernel](rng, configuration, device)
        assert interpretation.num_kernels == 1
    executed.append(configuration)


def three_steps(tiles):
    """A contracted dimension that takes three steps, the last of which is not full."""
    return 2 * tiles.depth + 48


def check_rows(rng, configuration, device):
    """Gate and up as `fused_moe` has them; otherwise as `grouped_matmul` does, and its gradient."""
    tiles = configuration.tiles
    options = {
        ("rows", 2): dict(activation=SILU, bias=True),
        ("rows", 1): dict(compact=True, bias=True),
        ("rows_gradient", 1): dict(compact=True, contract="out"),
    }[configuration.kernel, configuration.projections]
    sizes = (tiles.rows + 3, 0, 1)
    problem = RowsProblem.draw(rng, sizes, width_in=three_steps(tiles), width_out=tiles.columns + 64, **options)
    result, _ = multiply_rows(
        **problem.operands,
        table=problem.table(tiles.rows),
        tiles=tiles,
        zero_groups=problem.is_compact,
        exact_rows=problem.is_compact,
        output_dtype=configuration.output_dtype,
        device=device,
    )
    problem.assert_right(result)


def check_stream(rng, configuration, device):
    tiles = configuration.tiles
    options = dict(activation=SILU, bias=True) if configuration.projections == 2 else dict(row_scale=True)
    width_in = max(2, tiles.splits) * tiles.depth + 64
    sizes = (tiles.rows + 3, 0, 1)
    problem = RowsProblem.draw(rng, sizes, width_in=width_in, width_out=tiles.columns + 64, **options)
    operands = {name: operand for name, operand in problem.operands.items() if name != "contract"}
    result = stream_weights(
        **operands,
        table=problem.table(tiles.rows),
        tiles=tiles,
        output_dtype=configuration.output_dtype,
        device=device,
    )
    problem.assert_right(result)


def check_weights_gradient(rng, configuration, device):
    tiles = configuration.tiles
    # The hot group takes three steps or four; its neighbours begin within 8 rows of its end.
    sizes = np.array([2 * tiles.depth + 16, 0, 17, 1], np.int32)
    starts = np.cumsum(sizes) - sizes + np.array([3, 3, 3, 40], np.int32)
    num_rows = int(starts[-1]) + 8
    member = np.zeros(num_rows, bool)
    for start, size in zip(starts, sizes, strict=True):
        member[start : start + size] = True

    def draw(width):
        return jnp.array(np.where(member[:, None], rng.normal(size=(num_rows, width)), np.nan), jnp.bfloat16)

    cotangent, rows = draw(tiles.out_columns + 48), draw(tiles.in_columns - 48)
    result = weights_gradient(
        cotangent,
        rows,
        Groups(jnp.array(starts), jnp.array(sizes)),
        tiles=tiles,
        output_dtype=configuration.output_dtype,
        device=device,
    )
    parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    expected = np.stack([np.float64(cotangent)[part].T @ np.float64(rows)[part] for part in parts])
    assert_rounded_once(result, expected)
    np.testing.assert_array_equal(result[1], 0)


@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_of_a_device_is_among_the_configurations(device):
    kernels = {each.kernel for each in EXECUTED if each.device == device}
    assert kernels == {"rows", "rows_gradient", "weights_gradient"} | ({"stream"} if device == "h200" else set())


def test_row_tiles_chosen_by_default_for_any_shape_are_among_the_configurations():
    known = {(each.kernel, each.projections, each.tiles) for each in EXECUTED if each.device == "h200"}
    sizes = itertools.product((1, 100, 2000, 10**5), (1, 4, 8, 32, 256), (16, 64, 200, 768, 2880, 14336), (1, 2))
    for num_rows, num_groups, width, projections in sizes:
        tiles = default_row_tiles(num_rows, num_groups, width, projections, 2, GPU_DEVICES["h200"])
        tiles = dataclasses.replace(tiles, panel=PANEL)
        assert ("rows", projections, tiles) in known
        assert projections == 2 or ("rows_gradient", 1, tiles) in known


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [8, 128, 2048])
def test_what_the_ops_choose_is_among_the_configurations(tokens, device, monkeypatch):
    known, asked = set(tile_configurations(device)), []
    choose = matmuls.choose_tiles

    def recording(kernel, **sizes):
        chosen = choose(kernel, **sizes)
        dtype = sizes["output_dtype"] if kernel == "weights_gradient" else jnp.bfloat16
        asked.append(
            TileConfiguration(device, kernel, sizes.get("projections", 1), jnp.dtype(dtype).name, chosen.tiles)
        )
        return chosen

    monkeypatch.setattr(matmuls, "choose_tiles", recording)
    shape = EXPERT_SHAPES["qwen3-30b-a3b"]
    block = shape.fused_moe_arguments(tokens)
    of_floating = {name: array for name, array in block.items() if array is not None and name != "topk_ids"}
    num_rows, sizes = tokens * shape.top_k, jax.ShapeDtypeStruct((shape.local_experts,), jnp.int32)
    rows = jax.ShapeDtypeStruct((num_rows, shape.intermediate_size), jnp.bfloat16)

    def of_block(floating, ids):
        return fused_moe(topk_ids=ids, **floating).astype(jnp.float32).sum()

    def of_matmul(rows, weights, sizes):
        return grouped_matmul(rows, weights, sizes).astype(jnp.float32).sum()

    with targeting(GPU_DEVICES[device]):
        jax.eval_shape(of_block, of_floating, block["topk_ids"])
        jax.eval_shape(jax.grad(of_block), of_floating, block["topk_ids"])
        jax.eval_shape(jax.grad(of_matmul, argnums=(0, 1)), rows, block["down_proj"], sizes)
    assert {each.kernel for each in asked} >= {"rows", "rows_gradient", "weights_gradient"}
    assert set(asked) <= known
