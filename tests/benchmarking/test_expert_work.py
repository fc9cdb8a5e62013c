"""Routings to measure with, and the counting of work."""

import math

import numpy as np
import pytest

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.benchmarking.expert_work import (
    ROUTINGS,
    ExpertWork,
    draw_topk_ids,
    local_group_sizes,
    sets_to_rotate,
    tile_ceiling,
    wave_ceiling,
)
from moe_jax.kernels import Activation

SMALL = ExpertShape(name="small", hidden_size=16, intermediate_size=24, num_experts=6, top_k=2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_token_has_different_experts(rng, routing):
    shape = EXPERT_SHAPES["olmoe-1b-7b"]
    ids = draw_topk_ids(rng, shape, 100, routing)
    assert ids.shape == (100, 8)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < 64
    assert all(len(set(row)) == 8 for row in ids)


def test_uniform_routing_has_no_favourites_and_zipf_does(rng):
    shape = ExpertShape(name="one", hidden_size=8, intermediate_size=8, num_experts=32, top_k=1)
    tokens = 64_000
    uniform = local_group_sizes(shape, draw_topk_ids(rng, shape, tokens, "uniform"))
    assert uniform.max() - uniform.min() < 10 * math.sqrt(tokens / 32)
    zipf = np.sort(local_group_sizes(shape, draw_topk_ids(rng, shape, tokens, "zipf")))[::-1]
    expected = tokens / np.arange(1, 33) / sum(1 / r for r in range(1, 33))
    np.testing.assert_allclose(zipf[:8], expected[:8], rtol=0.1)


def test_group_sizes_are_those_of_local_experts():
    shape = ExpertShape(name="rank", hidden_size=8, intermediate_size=8, num_experts=6, top_k=2, ranks=2)
    np.testing.assert_array_equal(local_group_sizes(shape, np.array([[0, 5], [2, 0], [3, 4]])), [2, 0, 1])


def test_work_counts_rows_that_exist_and_experts_that_have_rows():
    work = ExpertWork.of(SMALL, np.array([3, 0, 0, 1, 0, 0]), tokens=2)
    assert work.rows == 4
    assert work.flops == 4 * (2 * 16 * 48 + 2 * 24 * 16)
    assert work.weight_bytes == 2 * (48 * 16 + 16 * 24) * 2
    assert work.bytes == work.weight_bytes + 2 * 2 * 16 * 2


def test_work_counts_biases_and_leaves_out_the_gate_that_is_not_there():
    plain = ExpertShape(
        name="plain",
        hidden_size=16,
        intermediate_size=24,
        num_experts=6,
        top_k=2,
        activation=Activation("relu2_no_mul"),
        has_bias=True,
    )
    work = ExpertWork.of(plain, np.array([3, 0, 0, 0, 0, 0]), tokens=2)
    assert work.flops == 3 * (2 * 16 * 24 + 2 * 24 * 16)
    assert work.weight_bytes == (2 * 24 * 16 + 24 + 16) * 2


def test_one_token_of_qwen3_touches_75_megabytes(rng):
    shape = EXPERT_SHAPES["qwen3-30b-a3b"]
    sizes = local_group_sizes(shape, draw_topk_ids(rng, shape, 1, "uniform"))
    assert ExpertWork.of(shape, sizes, 1).weight_bytes == 8 * 3 * 2048 * 768 * 2  # 75.5e6


@pytest.mark.parametrize(
    ("sizes", "tile_rows", "ceiling"),
    [([128], 128, 1), ([129], 128, 129 / 256), ([1, 0, 127], 64, 128 / 192), ([0, 0], 64, None), ([64, 64], 128, 0.5)],
)
def test_partly_filled_tiles_bound_the_rate(sizes, tile_rows, ceiling):
    assert tile_ceiling(np.array(sizes), tile_rows) == (None if ceiling is None else pytest.approx(ceiling))


@pytest.mark.parametrize(("rows", "tile_rows"), [(256, 128), (256, 64), (512, 128), (1024, 128)])
def test_random_routing_fills_half_of_the_last_tile_or_starts_another(rng, rows, tile_rows):
    """Group sizes scatter around a multiple of the tile, so half of the groups need a tile more."""
    shape = EXPERT_SHAPES["qwen3-30b-a3b"]
    sizes = local_group_sizes(shape, draw_topk_ids(rng, shape, rows * 16, "uniform"))
    tiles = rows / tile_rows
    assert tile_ceiling(sizes, tile_rows) == pytest.approx(tiles / (tiles + 0.5), abs=0.07)


def test_the_last_wave_bounds_the_rate():
    assert wave_ceiling(264, 132) == 1
    assert wave_ceiling(133, 132) == pytest.approx(133 / 264)
    assert wave_ceiling(0, 132) is None


def test_enough_argument_sets_take_turns_to_empty_the_cache():
    assert sets_to_rotate(10**10, 60 << 20) == 2
    assert sets_to_rotate(60 << 20, 60 << 20) == 5
    assert sets_to_rotate(1, 60 << 20) == 16
    assert sets_to_rotate(0, 60 << 20) == 16
