"""Ragged all-to-all in rounds: a rank receives no more rows at once than there is room for, and computes all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import call
from support.sharded_layers import (
    SHARED,
    assert_equal_results,
    layer_pair,
    make_mesh,
    small_config,
    value_and_gradients,
)

from moe_jax import ParallelConfig, SharedExpertsConfig
from moe_jax.parallel import ragged_all_to_all
from moe_jax.parallel.axes import LayerAxes
from moe_jax.parallel.dispatch import DispatchRequest, DispatchSettings
from moe_jax.parallel.ragged_exchange import forth_and_back
from moe_jax.parallel.ragged_rounds import RaggedRounds

FUSED = SharedExpertsConfig(intermediate_size=16, bias=True)
SPLIT = dict(expert_axis="expert", tensor_axis="tensor", data_axis="data", sequence_axis="expert")
TOKENS = {
    "split over the expert axis": SPLIT,
    "on all ranks of an expert axis": SPLIT | dict(sequence_axis=None),
    "as in vLLM": SPLIT | dict(expert_axis=("data", "expert"), sequence_axis=None),
    "split over a tensor axis": SPLIT | dict(tensor_axis=("tensor", "data"), sequence_axis=None),
}


@pytest.mark.parametrize("num_rows", [1, 3, 7, 1000])
def test_every_row_travels_in_one_round_and_none_lies_behind_the_buffer(num_rows, rng):
    ranks = 4
    sizes = rng.integers(0, 6, size=(ranks, ranks))
    sizes[1], sizes[:, 2] = 0, 0  # one rank sends nothing, and one gets nothing
    at_sender = np.cumsum(sizes, axis=1) - sizes
    expected = {  # receiver -> rows (source, row there) in the order in which they arrive over all rounds
        r: [(s, at_sender[s, r] + i) for s in range(ranks) for i in range(sizes[s, r])] for r in range(ranks)
    }
    arrived = {r: [] for r in range(ranks)}
    for number in range(-(-int(sizes.sum(axis=0).max()) // num_rows)):
        ways = [forth_and_back(jnp.asarray(sizes), r, number * num_rows, num_rows) for r in range(ranks)]
        forth, back = ([[np.asarray(array) for array in way[direction]] for way in ways] for direction in (0, 1))
        for r in range(ranks):
            buffer = {}
            for s in range(ranks):
                first, sent, place, received = (forth[s][0][r], forth[s][1][r], forth[s][2][r], forth[r][3][s])
                assert sent == received == back[r][1][s] == back[s][3][r]
                assert back[r][0][s] == place
                assert back[r][2][s] == first
                buffer |= {int(place + i): (s, int(first + i)) for i in range(sent)}
            assert sorted(buffer) == list(range(len(buffer)))  # no gaps, and none twice
            assert len(buffer) == sum(forth[r][3]) <= num_rows
            arrived[r] += [buffer[place] for place in sorted(buffer)]
    assert arrived == expected


def primitives(jaxpr, inside=()):
    """Every equation of a program, with the names of those that it is inside of."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: isinstance(leaf, (Jaxpr, ClosedJaxpr))):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                yield from primitives(inner, (*inside, equation.primitive.name))


@pytest.mark.parametrize("one_row_per_rank", [False, True])
def test_nothing_in_the_program_has_room_for_the_rows_of_all_ranks(one_row_per_rank, rng, monkeypatch):
    monkeypatch.setattr(LayerAxes, "platform", "tpu")  # where the collective is not emulated
    per_rank, top_k, largest = 100, 4, {}
    for ranks in (4, 8):
        parallel = ParallelConfig(
            strategy="ragged_all_to_all", buffer_factor=1.0, one_row_per_rank=one_row_per_rank, **SPLIT
        )
        config = small_config(num_experts=64, top_k=top_k, expert_bias=False)
        _, layer = layer_pair(rng, config, make_mesh(1, ranks, 1), parallel)
        graph, state = nnx.split(layer)
        gradient = jax.grad(lambda state, x, graph=graph: nnx.merge(graph, state)(x).sum(), argnums=(0, 1))
        program = jax.make_jaxpr(gradient)(state, jnp.zeros((ranks * per_rank, 6)))
        on_rank = [found for found in primitives(program.jaxpr) if "shard_map" in found[1]]
        exchanges = [
            (equation, inside) for equation, inside in on_rank if equation.primitive.name == "ragged_all_to_all"
        ]
        assert {"while" in inside for _, inside in exchanges} == {True, False}
        rows = {array.aval.shape[0] for equation, _ in exchanges for array in equation.invars[:2]}
        assert max(rows) <= per_rank * top_k
        largest[ranks] = max(array.aval.size for equation, _ in on_rank for array in equation.outvars)
    assert largest[8] <= largest[4]


def settings_for(parallel, mesh, **changes):
    axes = LayerAxes.resolve(parallel, mesh)
    return DispatchSettings(axes=axes, num_experts=256, buffer_factor=parallel.buffer_factor, **changes)


@pytest.mark.parametrize(
    ("factor", "one_row_per_rank", "num_tokens", "rows"),
    [
        # 8 choices per token of 256 experts on 8 ranks, 32 on each.
        (1.0, False, 4096, 4096 * 8),
        (2.5, False, 4096, 2.5 * 4096 * 8),
        (100.0, False, 4096, 8 * 4096 * 8),  # all rows there can be
        (1.0, True, 4096, np.ceil(4096 * 8 * (1 - (7 / 8) ** 8))),
        (None, False, 4096, 1.25 * 4096 * 8),
        (None, False, 1024, 512 * 32),  # 1.25 times the even share are fewer rows than pay for a round
        (None, False, 4, 8 * 4 * 8),
        (0.001, False, 4, 1),
    ],
)
def test_the_buffer_has_room_for_what_evenly_spread_choices_bring(factor, one_row_per_rank, num_tokens, rows):
    parallel = ParallelConfig(expert_axis="expert", sequence_axis="expert", buffer_factor=factor)
    settings = settings_for(parallel, make_mesh(1, 8, 1), one_row_per_rank=one_row_per_rank)
    assert settings.buffer_rows(num_tokens, top_k=8) == rows


@pytest.mark.parametrize("one_row_per_rank", [False, True])
@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75, 1.0, None])
def test_no_more_rows_are_expected_than_a_round_has_choices(factor, one_row_per_rank):
    parallel = ParallelConfig(expert_axis="expert", sequence_axis="expert", buffer_factor=factor)
    settings = settings_for(parallel, make_mesh(1, 8, 1), one_row_per_rank=one_row_per_rank)
    for num_tokens in range(400):
        for top_k in (1, 3, 8):
            rounds = RaggedRounds.of(settings, num_tokens, top_k)
            assert 0 <= rounds.expected_rows <= rounds.num_rows * (top_k if one_row_per_rank else 1)


CASES = [
    # Where tokens are, sizes (data, expert, tensor), options of the exchange and of the layer.
    ("split over the expert axis", (2, 4, 1), dict(), dict()),
]
SLOW_CASES = [
    ("as in vLLM", (2, 2, 2), dict(one_row_per_rank=True), dict(shared_experts=FUSED, fuse_shared_experts=True)),
    ("split over a tensor axis", (2, 2, 2), dict(micro_batches=2), dict()),
    ("on all ranks of an expert axis", (2, 4, 1), dict(one_row_per_rank=True), dict()),
    (
        "split over the expert axis",
        (1, 4, 2),
        dict(micro_batches=2, one_row_per_rank=True),
        dict(num_experts=12, num_redundant_experts=4, top_k=3),
    ),
    ("as in vLLM", (2, 4, 1), dict(), dict(shared_experts=FUSED, fuse_shared_experts=True)),
    ("as in vLLM", (2, 2, 2), dict(one_row_per_rank=True), dict(shared_experts=SHARED)),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_a_layer_whose_rows_come_in_rounds_equals_the_layer_on_one_device(case, rng):
    tokens, sizes, options, changes = case
    parallel = ParallelConfig(strategy="ragged_all_to_all", buffer_factor=0.4, **TOKENS[tokens], **options)
    single, sharded = layer_pair(rng, small_config(**changes), make_mesh(*sizes), parallel)
    x, direction = (jnp.asarray(rng.normal(size=(2, 13, 6)), jnp.float32) for _ in range(2))
    expected, actual = (value_and_gradients(layer, x, direction) for layer in (single, sharded))
    aux = assert_equal_results(expected, actual)
    assert aux.dropped_rows == 0
    ids = aux.topk_ids.reshape(-1, aux.topk_ids.shape[-1])
    physical = ids if sharded.replicas is None else np.asarray(sharded.replicas(ids))
    assert aux.sent_rows.tolist() == count_sent_rows(physical, sharded.axes, sharded.config)


def test_one_hot_expert_few_tokens_and_none_at_all_take_as_many_rounds_as_they_need(rng):
    parallel = ParallelConfig(strategy="ragged_all_to_all", buffer_factor=0.7, **SPLIT)
    single, sharded = layer_pair(rng, small_config(), make_mesh(2, 4, 1), parallel)
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    hot = np.broadcast_to([6, 7], (16, 2)).copy()
    of_one_group_only = np.where(np.arange(16)[:, None] < 8, hot, -1)
    for ids in (
        hot,
        of_one_group_only,
        np.full((16, 2), -1),
        rng.permuted(np.tile(np.arange(8), (16, 1)), axis=1)[:, :2],
    ):
        ids = jnp.asarray(ids, jnp.int32)
        y, aux = call(sharded, x, forced_ids=ids, with_aux=True)
        np.testing.assert_allclose(y, call(single, x, forced_ids=ids), rtol=1e-5, atol=1e-5)
        assert aux.dropped_rows == 0
    assert call(sharded, x[:0]).shape == (0, 6)


@pytest.mark.parametrize("strategy", ["replicated", "allgather_reducescatter", "padded_all_to_all"])
def test_strategies_without_rounds_refuse_a_buffer(strategy, rng):
    tokens = TOKENS["on all ranks of an expert axis" if strategy == "replicated" else "split over the expert axis"]
    parallel = ParallelConfig(strategy=strategy, buffer_factor=2.0, **tokens)
    with pytest.raises(NotImplementedError, match=r"it has no rounds, so buffer_factor must be None, got 2.0"):
        layer_pair(rng, small_config(), make_mesh(1, 4, 1), parallel)


@pytest.mark.parametrize(("factor", "rounds", "room"), [(None, 1, 8 * 32), (1.0, 1, 32), (0.5, 2, 16), (0.3, 4, 10)])
def test_what_the_emulation_gathers_is_counted_for_every_round(factor, rounds, room):
    parallel = ParallelConfig(expert_axis="expert", sequence_axis="expert", buffer_factor=factor)
    axes = LayerAxes.resolve(parallel, make_mesh(1, 8, 1))
    config = small_config(num_experts=64, top_k=2, parallel=parallel)
    request = DispatchRequest(axes=axes, config=config, num_tokens=8 * 16)
    assert ragged_all_to_all.rows_moved(request) == 7 * rounds * (32 + room)


def test_a_buffer_chooses_the_strategy_that_has_one(rng):
    _, layer = layer_pair(rng, small_config(), make_mesh(1, 4, 1), ParallelConfig(buffer_factor=2.0, **SPLIT))
    assert layer.explain_dispatch(64).implementation == "ragged_all_to_all"


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_a_buffer_that_is_no_size_is_refused(factor):
    with pytest.raises(ValueError, match="buffer_factor must be positive and finite"):
        ParallelConfig(buffer_factor=factor)
