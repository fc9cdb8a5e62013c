"""What a block's events don't tell: the second pass of split contractions, and all of it where there are no events."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_interpretation import interpreting

from moe_jax.benchmarking import gpu_products, gpu_suite
from moe_jax.benchmarking.device_timer import Timing
from moe_jax.benchmarking.expert_checks import random_weights
from moe_jax.benchmarking.expert_contestants import Contestant, as_given
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.benchmarking.gpu_cases import Case
from moe_jax.benchmarking.gpu_ceilings import Ceilings
from moe_jax.benchmarking.gpu_products import (
    MatmulTime,
    TiledProduct,
    products,
    split_products,
    streamed_products,
    waves_ceiling,
)
from moe_jax.benchmarking.gpu_programs import Program
from moe_jax.benchmarking.gpu_report import OURS
from moe_jax.kernels.device import GPU_DEVICES, targeting
from moe_jax.kernels.mosaic_gpu.schedule import aligned_groups

H200 = GPU_DEVICES["h200"]
SPLIT = Case(kind="forward", shape=EXPERT_SHAPES["deepseek-v3-ep8"], tokens=32, routing="uniform")
WHOLE = dataclasses.replace(SPLIT, tokens=128)
TILED = dataclasses.replace(SPLIT, tokens=8192)


def timing(kernel, rest):
    kernels = {"x_mosaic_gpu_kernel": kernel} | ({"loop_add_fusion": rest} if rest else {})
    return Timing(queued=1e-3, issue=1e-6, busy=[kernel + rest] * 10, kernels=kernels)


@pytest.mark.parametrize(
    ("case", "streamed", "split"),
    [
        (SPLIT, {"gate_up": 4, "down": 1}, ["gate_up"]),
        (WHOLE, {"gate_up": 1, "down": 1}, []),
        (TILED, {}, []),
        (dataclasses.replace(SPLIT, kind="backward"), {}, []),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_products_whose_contraction_is_split_are_known(case, streamed, split):
    assert streamed_products(case) == []  # on a CPU
    with targeting(H200):
        assert {product.place: product.tiles.splits for product in streamed_products(case)} == streamed
        assert [product.place for product in split_products(case)] == split


@pytest.mark.slow
@pytest.mark.parametrize("place", ["gate_up", "down"])
def test_a_product_alone_is_that_of_the_block(place, rng, monkeypatch):
    shape = ExpertShape(name="small", hidden_size=192, intermediate_size=128, num_experts=3, top_k=1)
    case, sizes = Case(kind="forward", shape=shape, tokens=12, routing="uniform"), np.array([9, 0, 3])
    with targeting(H200):
        product = next(product for product in streamed_products(case) if product.place == place)
    product = dataclasses.replace(product, tiles=dataclasses.replace(product.tiles, depth=64, splits=2))
    weights = random_weights(shape, jax.random.key(1))
    (arguments,) = product.arguments(weights, [sizes], jax.random.key(2))
    assert jax.tree.map(jnp.shape, arguments) == jax.tree.map(lambda array: array.shape, product.shapes())
    with interpreting():
        result = np.asarray(product.function(*arguments), np.float64)
    rows, matrices = (np.asarray(array, np.float64) for array in arguments[:2])
    groups = aligned_groups(jnp.asarray(sizes, jnp.int32))
    for start, size, own in zip(groups.starts, groups.sizes, matrices, strict=True):
        given = rows[start : start + size]
        expected = (
            given @ own.T
            if place == "down"
            else np.asarray(shape.activation(*(jnp.asarray(given @ m.T, jnp.float32) for m in own)))
        )
        np.testing.assert_allclose(result[start : start + size], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("in_block", "alone", "counted"),
    [
        (timing(6e-6, 5e-6), timing(5e-6, 2e-6), 8e-6),
        (timing(6e-6, 1e-6), timing(5e-6, 2e-6), 7e-6),  # no more than the whole block
        (timing(6e-6, 5e-6), None, 11e-6),  # it does not compile: the whole block counts
    ],
    ids=["kernel and second pass", "at most the block", "unknown"],
)
def test_bandwidth_of_a_split_product_is_judged_with_its_second_pass(in_block, alone, counted, rng, monkeypatch):
    case = dataclasses.replace(SPLIT, shape=dataclasses.replace(SPLIT.shape, hidden_size=64, intermediate_size=64))
    ceilings = Ceilings(dense_flops=1e12, copy_bytes=1e12, launch_seconds=1e-6, device_events=True, timer="scripted")
    suite = gpu_suite.Suite(
        ceilings=ceilings, rng=rng, deadline=time.monotonic() + 600, l2_bytes=1, report=lambda line: None
    )
    with targeting(H200):
        product = streamed_products(SPLIT)[0]
    monkeypatch.setattr(gpu_suite, "streamed_products", lambda case: [product])
    monkeypatch.setattr(gpu_suite, "split_products", lambda case: [product])
    monkeypatch.setattr(gpu_products.StreamedProduct, "arguments", lambda self, weights, sizes, key: [()])
    contestant = Contestant(OURS, lambda *arguments: None, as_given, is_ours=True)
    monkeypatch.setattr(suite, "_entrants", lambda case: [contestant])

    def compile_all(programs, threads, until):
        return {
            key: Program(None, "no")
            if key[0] == "gate_up" and alone is None
            else Program(functools.partial(str, key[0]))
            for key in programs
        }

    monkeypatch.setattr(gpu_suite, "compile_all", compile_all)
    passed = gpu_suite.Check("forward", 0.0, True)
    monkeypatch.setattr(suite, "_check", lambda *arguments: passed)
    monkeypatch.setattr(suite, "_time", lambda call, arguments: alone if call() == "gate_up" else in_block)
    suite.run([case])
    (row,) = suite.rows
    assert row["failed"] is None
    assert row["splits"] == {"gate_up": 4}
    assert row["matmul_seconds"] == pytest.approx(counted)
    assert row["bandwidth_share"] == pytest.approx(row["weight_bytes"] / counted / 1e12)


def test_the_last_waves_of_tiles_bound_the_rate_of_a_block():
    """One rank's 8 experts of 128 rows, in tiles of 128 rows and 128 or 256 columns: 128 tiles, then 224, for 132 blocks."""
    case = dataclasses.replace(SPLIT, shape=EXPERT_SHAPES["deepseek-v3-ep32"], tokens=2048)
    sizes = [np.full(8, 128)]
    assert waves_ceiling(case, sizes) is None  # on a CPU
    with targeting(H200):
        gate_up, down = (product.tiles for product in products(case))
        assert ((gate_up.rows, gate_up.columns), (down.rows, down.columns)) == ((128, 128), (128, 256))
        expected = 3 / (2 / (128 / 132) + 1 / (224 / 264))
        assert waves_ceiling(case, sizes) == pytest.approx(expected)
        assert waves_ceiling(case, [*sizes, *sizes]) == pytest.approx(expected)
        assert waves_ceiling(SPLIT, [np.full(32, 1)]) is None
        assert waves_ceiling(case, [np.zeros(8, int)]) is None


def without_events(seconds):
    return Timing(queued=seconds, issue=1e-6)


@pytest.mark.parametrize(
    ("block", "alone", "expected"),
    [(9e-6, [3e-6, 4e-6], 7e-6), (6e-6, [3e-6, 4e-6], 6e-6), (9e-6, None, 9e-6), (9e-6, [], 9e-6)],
    ids=["sum of the products", "at most the block", "one failed", "none"],
)
def test_without_events_the_products_alone_count(block, alone, expected):
    alone = None if alone is None else [without_events(seconds) for seconds in alone]
    matmuls = MatmulTime.by_clock(without_events(block), alone)
    assert (matmuls.seconds, matmuls.second_pass) == (pytest.approx(expected), None)


def test_a_block_whose_events_got_lost_counts_as_a_whole():
    matmuls = MatmulTime.by_events(without_events(9e-6), [timing(2e-6, 1e-6)])
    assert matmuls.seconds == 9e-6


@pytest.mark.parametrize("events", [True, False])
def test_without_events_all_products_are_compiled_alone(events, rng):
    ceilings = Ceilings(dense_flops=1e12, copy_bytes=1e12, launch_seconds=1e-6, device_events=events, timer="scripted")
    suite = gpu_suite.Suite(ceilings=ceilings, rng=rng, deadline=0, l2_bytes=1)
    backward = dataclasses.replace(TILED, kind="backward")
    with targeting(H200):
        places = [[product.place for product in suite._products(case)] for case in (SPLIT, TILED, backward)]
    forward = ["rows of gate_up", "rows of down"]
    gradients = [f"{kernel}_gradient of {place}" for place in ("gate_up", "down") for kernel in ("rows", "weights")]
    if events:
        assert places == [["gate_up"], [], []]
    else:
        assert places[:2] == [["gate_up", "down"], forward]
        assert sorted(places[2]) == sorted(forward + gradients)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["rows", "rows_gradient", "weights_gradient"])
def test_a_tiled_product_alone_is_that_of_the_block(kernel, rng):
    shape = ExpertShape(name="small", hidden_size=64, intermediate_size=128, num_experts=2, top_k=1)
    case, sizes = Case(kind="backward", shape=shape, tokens=70, routing="uniform"), np.array([61, 9])
    with targeting(H200):
        found = [product for product in products(case) if isinstance(product, TiledProduct)]
    product = next(product for product in found if product.place == f"{kernel} of down")
    weights = random_weights(shape, jax.random.key(1))
    (arguments,) = product.arguments(weights, [sizes], jax.random.key(2))
    assert jax.tree.map(jnp.shape, arguments) == jax.tree.map(lambda array: array.shape, product.shapes())
    with interpreting():
        result = np.asarray(product.function(*arguments), np.float64)
    rows, cotangent, matrices = (np.asarray(array, np.float64) for array in arguments[:3])
    groups = aligned_groups(jnp.asarray(sizes, jnp.int32))
    for expert, (start, size) in enumerate(zip(groups.starts, groups.sizes, strict=True)):
        own = slice(int(start), int(start + size))
        expected, seen = {
            "rows": (rows[own] @ matrices[expert, 0].T, result[own]),
            "rows_gradient": (cotangent[own] @ matrices[expert, 0], result[own]),
            "weights_gradient": (cotangent[own].T @ rows[own], result[expert]),
        }[kernel]
        np.testing.assert_allclose(seen, expected, rtol=2e-2, atol=2e-1)
