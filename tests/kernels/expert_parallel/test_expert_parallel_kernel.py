"""The kernel that sends rows to their experts while it multiplies others: executed on simulated devices, in TPU interpret mode."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.expert_parallel_problems import Problem, Setting
from support.tpu_interpretation import DMA_MODES

from moe_jax.kernels import Activation
from moe_jax.kernels.expert_parallel import kernel
from moe_jax.kernels.expert_parallel.tiles import ExpertParallelTiles

TOKENS, EXPERTS, TOP_K = 5, 2, 3
"""Per rank."""


def uneven(rng, ranks):
    """Any expert, and ids that are none."""
    return rng.integers(-1, ranks * EXPERTS + 1, size=(ranks * TOKENS, TOP_K))


def all_to_one_rank(rng, ranks):
    """Every choice of every token is an expert of the last rank."""
    return rng.integers((ranks - 1) * EXPERTS, ranks * EXPERTS, size=(ranks * TOKENS, TOP_K))


def all_to_one_expert(rng, ranks):
    """Each rank sends one block only, of all its pairs."""
    return np.full((ranks * TOKENS, TOP_K), rng.integers(0, ranks * EXPERTS))


def some_ranks_without_tokens(rng, ranks):
    """Ranks 0 and 2 send nothing, and nobody sends anything to rank 1."""
    ids = rng.integers(0, ranks * EXPERTS, size=(ranks, TOKENS, TOP_K))
    ids[::2][:2] = -1
    ids[ids // EXPERTS == 1] = -1
    return ids.reshape(-1, TOP_K)


def nothing(rng, ranks):
    """No token has an expert."""
    return np.full((ranks * TOKENS, TOP_K), -1)


def check(rng, setting, routing, **shape):
    problem = Problem.draw(rng, setting, tokens=TOKENS, experts=EXPERTS, top_k=TOP_K, **shape)
    problem = problem.routed(routing(rng, setting.num_ranks * setting.data_ranks) % (setting.num_ranks * EXPERTS + 1))
    problem.assert_right(problem.run()[0])


@pytest.mark.parametrize("dma", DMA_MODES)
@pytest.mark.parametrize("routing", [uneven, all_to_one_rank, some_ranks_without_tokens])
def test_each_token_gets_what_its_experts_compute_wherever_they_are(dma, routing, rng):
    check(rng, Setting(4, dma=dma), routing)


@pytest.mark.slow
@pytest.mark.parametrize("dma", DMA_MODES)
@pytest.mark.parametrize("routing", [all_to_one_expert, nothing])
def test_one_expert_or_none(dma, routing, rng):
    check(rng, Setting(4, dma=dma), routing)


EIGHT = Setting(8, axes=(("host", 2), ("chip", 4)))


@pytest.mark.slow
def test_eight_ranks_of_two_mesh_axes(rng):
    check(rng, EIGHT, uneven)


@pytest.mark.slow
@pytest.mark.parametrize("routing", [uneven, all_to_one_rank, some_ranks_without_tokens])
def test_eight_ranks_with_copies_that_run_at_once(routing, rng):
    check(rng, Setting(8, dma="eager"), routing)


@pytest.mark.slow
@pytest.mark.parametrize("dma", DMA_MODES)
def test_ranks_of_another_mesh_axis_do_not_meet(dma, rng):
    check(rng, Setting(4, dma=dma, data_ranks=2), uneven)


@pytest.mark.slow
def test_one_rank_sends_nothing(rng):
    check(rng, Setting(1), uneven)


def test_default_tiles_biases_and_bfloat16(rng):
    setting = Setting(2, Activation("swigluoai"), tiles=None, dma="eager")
    check(rng, setting, uneven, bias=True, dtype=jnp.bfloat16)


@pytest.mark.parametrize("narrow", ["x", "topk_weights"])
def test_tokens_or_router_weights_alone_may_have_16_bits(narrow, rng):
    problem = Problem.draw(rng, Setting(2, dma="eager"), tokens=TOKENS, experts=EXPERTS, top_k=TOP_K)
    narrowed = {narrow: problem.arrays[narrow].astype(jnp.bfloat16)}
    problem = dataclasses.replace(problem, arrays={**problem.arrays, **narrowed})
    problem.assert_right(problem.run()[0])


def test_no_tokens(rng):
    problem = Problem.draw(rng, Setting(2, tiles=None), tokens=0)
    assert problem.run()[0].shape == (0, 128)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "relu2_no_mul"])
def test_router_weights_on_the_input(activation, rng):
    setting = Setting(4, Activation(activation), apply_router_weight_on_input=True)
    check(rng, setting, uneven, bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 48, 64, 80, 144, 176, 256])
def test_tiles_are_computed_in_chunks_and_quarters_of_a_chunk(rows, rng):
    """Every number of quarters in the last chunk, alone and after whole chunks; some rows end a tile, some do not."""
    setting = Setting(2, tiles=ExpertParallelTiles(rows=128, intermediate=128, chunk=64, strip=128))
    problem = Problem.draw(rng, setting, tokens=128, experts=1, top_k=1)
    ids = np.full((2, 128), -1)
    ids[0, : rows // 2] = 1
    ids[1, : rows - rows // 2] = 1
    problem = problem.routed(ids.reshape(-1, 1))
    problem.assert_right(problem.run()[0])


@contextlib.contextmanager
def planted(monkeypatch, owner, name, replacement):
    """The kernel with one of its functions replaced."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        yield


def run_broken(rng, name):
    """A program of its own, as `name` is part of its key, on few rows, with what was seen of it."""
    problem = Problem.draw(rng, Setting(2, dma="eager", axes=((name, 2),)), tokens=3, experts=1, top_k=1)
    return problem.routed([[1], [0], [1], [0], [0], [1]]).run(checked=False)[1]


def test_a_forgotten_wait_for_received_rows_is_seen(monkeypatch, rng):
    def start(self, visit):
        self._read(visit).start()

    with planted(monkeypatch, kernel._TileStream, "start", start):
        seen = run_broken(rng, "without_wait")
    assert seen.num_racing
    assert seen.semaphores_left


def test_a_forgotten_wait_for_sent_rows_is_seen(monkeypatch, rng):
    def wait_for_results(problem, memory):
        for rank in kernel._other_ranks(problem):
            start, num_rows = memory.send_start[rank], memory.send_rows[rank]
            kernel._wait(memory.results.at[kernel._aligned(start, num_rows)], memory.returned_by.at[rank], num_rows)

    with planted(monkeypatch, kernel, "_wait_for_results", wait_for_results):
        seen = run_broken(rng, "without_drain")
    assert seen.semaphores_left
    assert not seen.num_racing


@pytest.mark.slow
def test_a_buffer_that_is_filled_again_before_its_results_have_left_is_seen(monkeypatch, rng):
    """One expert, three tiles: the third is read into the buffer from which the first's results are being sent."""

    def wait_returned(self, visit):
        pass

    setting = Setting(2, dma="eager", axes=(("without_wait_for_results", 2),))
    problem = Problem.draw(rng, setting, tokens=48, experts=1, top_k=1)
    with planted(monkeypatch, kernel._TileStream, "wait_returned", wait_returned):
        _, seen = problem.routed(np.ones((96, 1))).run(checked=False)
    assert seen.num_racing
    assert seen.semaphores_left


@pytest.mark.slow
def test_a_result_that_is_not_waited_for_is_seen(monkeypatch, rng):
    def wait_for_results(problem, memory):
        for rank in kernel._other_ranks(problem):
            start, num_rows = memory.send_start[rank], memory.send_rows[rank]
            kernel._wait(memory.sent.at[kernel._aligned(start, num_rows)], memory.sent_to.at[rank], num_rows)

    with planted(monkeypatch, kernel, "_wait_for_results", wait_for_results):
        seen = run_broken(rng, "without_results")
    assert seen.semaphores_left
