"""Dispatch at its limits: no tokens, one hot expert, no room, repeated choices, other kinds of meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import call, random_layer
from support.sharded_layers import SHARED, layer_pair, make_mesh, small_config, transforms

from moe_jax import GroupLimit, ParallelConfig, RouterConfig
from moe_jax.aot.collectives import read_collectives
from moe_jax.parallel import LayerAxes
from moe_jax.runner.elastic import move_layer
from moe_jax.runner.physical_experts import initial_placement
from moe_jax.runner.token_order import TokenOrder

STRATEGIES = ("allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all")
SLOW = pytest.mark.slow
SPLIT = dict(expert_axis="expert", tensor_axis="tensor", data_axis="data", sequence_axis="expert")


def forced(ids):
    return jnp.asarray(np.asarray(ids), jnp.int32)


@pytest.mark.parametrize(
    "strategy", ["ragged_all_to_all", *(pytest.param(name, marks=SLOW) for name in STRATEGIES[:2])]
)
def test_no_tokens_few_tokens_and_one_hot_expert_are_legal(strategy, rng):
    parallel = ParallelConfig(strategy=strategy, **SPLIT)
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), make_mesh(1, 4, 1), parallel)
    all_x = jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    all_ids = np.broadcast_to([6, 7], (7, 2))  # all on the last rank
    expected = call(single, all_x, forced_ids=forced(all_ids))
    for num_tokens in (0, 1, 7):
        x, ids = all_x[:num_tokens], all_ids[:num_tokens]
        y, aux = call(sharded, x, forced_ids=forced(ids), with_aux=True)
        np.testing.assert_allclose(y, expected[:num_tokens], rtol=1e-5, atol=1e-5)
        assert aux.dropped_rows == 0
        if num_tokens:
            assert aux.sent_rows.tolist() == count_sent_rows(ids, sharded.axes, sharded.config)


@pytest.mark.parametrize(
    ("strategy", "one_row_per_rank"),
    [
        ("ragged_all_to_all", False),
        ("padded_all_to_all", True),
        pytest.param("ragged_all_to_all", True, marks=SLOW),
        pytest.param("padded_all_to_all", False, marks=SLOW),
    ],
)
def test_repeated_choices_and_choices_of_nothing_travel_no_more_than_once(strategy, one_row_per_rank, rng):
    parallel = ParallelConfig(strategy=strategy, one_row_per_rank=one_row_per_rank, **SPLIT)
    single, sharded = layer_pair(rng, small_config(top_k=3), make_mesh(1, 4, 1), parallel)
    x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    ids = rng.integers(-1, 8, size=(8, 3))
    ids[0], ids[1], ids[2] = [5, 5, 5], [-1, -1, -1], [7, -1, 7]
    y, aux = call(sharded, x, forced_ids=forced(ids), with_aux=True)
    np.testing.assert_allclose(y, call(single, x, forced_ids=forced(ids)), rtol=1e-5, atol=1e-5)
    assert aux.sent_rows.tolist() == count_sent_rows(ids, sharded.axes, sharded.config)


def kept_with_capacity(ids, *, ranks, local_experts, capacity, one_row_per_rank):
    """Which choices find room, by going through tokens in order: a rank has room for `capacity` rows from each other."""
    per_rank = len(ids) // ranks
    kept = np.zeros(ids.shape, bool)
    for source in range(ranks):
        used, room = np.zeros(ranks, int), {}
        for token in range(source * per_rank, (source + 1) * per_rank):
            for choice, expert in enumerate(ids[token]):
                owner = expert // local_experts
                row = (token, owner if one_row_per_rank else expert)
                if row not in room:
                    room[row] = used[owner] < capacity
                    used[owner] += 1
                kept[token, choice] = room[row]
    return kept


@pytest.mark.parametrize(("one_row_per_rank", "capacity"), [(False, 2), pytest.param(True, 1, marks=SLOW)])
def test_rows_without_room_are_dropped_counted_and_nothing_else(one_row_per_rank, capacity, rng):
    # 4 tokens per rank, 3 choices, 4 ranks: evenly spread, 3 rows for each rank, or 2.3 with one row per rank.
    parallel = ParallelConfig(
        strategy="padded_all_to_all", capacity_factor=0.4, one_row_per_rank=one_row_per_rank, **SPLIT
    )
    single, sharded = layer_pair(
        rng, small_config(top_k=3, router=RouterConfig(renormalize=False)), make_mesh(1, 4, 1), parallel
    )
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    ids = np.stack([rng.permutation(8)[:3] for _ in range(16)])
    ids[:4] = [0, 1, 2]
    kept = kept_with_capacity(ids, ranks=4, local_experts=2, capacity=capacity, one_row_per_rank=one_row_per_rank)
    assert not kept.all()
    y, aux = call(sharded, x, forced_ids=forced(ids), with_aux=True)
    # Not renormalised, so a dropped choice is one that was never made.
    expected = call(single, x, forced_ids=forced(np.where(kept, ids, -1)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert aux.dropped_rows == (~kept).sum()
    assert aux.sent_rows.tolist() == count_sent_rows(np.where(kept, ids, -1), sharded.axes, sharded.config)


@pytest.mark.parametrize("one_row_per_rank", [False, pytest.param(True, marks=SLOW)])
def test_weight_on_the_input_travels_with_its_row(one_row_per_rank, rng):
    settings = small_config(top_k=1, apply_router_weight_on_input=True, router=RouterConfig(renormalize=False))
    x = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    parallel = ParallelConfig(strategy="ragged_all_to_all", one_row_per_rank=one_row_per_rank, **SPLIT)
    single, sharded = layer_pair(rng, settings, make_mesh(1, 2, 1), parallel)
    np.testing.assert_allclose(call(sharded, x), call(single, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["padded_all_to_all", pytest.param("ragged_all_to_all", marks=SLOW)])
def test_tokens_of_16_bits_are_rounded_once_when_multiplied_by_their_weight(strategy, rng):
    router = RouterConfig(renormalize=False)
    settings = small_config(num_experts=12, top_k=1, apply_router_weight_on_input=True, router=router)
    single, sharded = layer_pair(rng, settings, make_mesh(1, 4, 1), ParallelConfig(strategy=strategy, **SPLIT))
    x = jnp.asarray(rng.normal(size=(64, 6)), jnp.bfloat16)
    # Equal logits: every weight is 1/12, which bfloat16 would round.
    given = dict(router_logits=jnp.zeros((64, 12)), forced_ids=forced(rng.integers(12, size=(64, 1))))
    np.testing.assert_array_equal(call(sharded, x, **given), call(single, x, **given))


@nnx.jit
def value_and_gradient(layer, x, given):
    return jax.value_and_grad(lambda x: (layer(x, **given) ** 2).sum())(x)


@pytest.mark.parametrize("strategy", ["padded_all_to_all", pytest.param("ragged_all_to_all", marks=SLOW)])
@pytest.mark.parametrize(
    ("one_row_per_rank", "top_k"), [(False, 3), pytest.param(True, 3, marks=SLOW), pytest.param(False, 1, marks=SLOW)]
)
def test_numbers_of_64_bits_keep_them_on_their_way(strategy, one_row_per_rank, top_k, rng):
    """Results are summed in the dtype of the tokens where that is wider than the weights, which the router gives in float32."""
    settings = small_config(param_dtype=jnp.float64, top_k=top_k, apply_router_weight_on_input=top_k == 1)
    parallel = ParallelConfig(strategy=strategy, one_row_per_rank=one_row_per_rank, **SPLIT)
    with jax.enable_x64(True):
        single, sharded = layer_pair(rng, settings, make_mesh(1, 4, 1), parallel)
        x = jnp.asarray(rng.normal(size=(8, 6)))
        # Equal logits: a weight has the same bits wherever it is computed. Of repeated choices one carries the row of all.
        given = dict(router_logits=jnp.zeros((8, 8)), forced_ids=forced(rng.integers(8, size=(8, top_k))))
        expected, actual = (value_and_gradient(layer, x, given) for layer in (single, sharded))
    for one, other in zip(expected, actual, strict=True):
        assert other.dtype == jnp.float64
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


def test_masked_tokens_may_hold_nan(rng):
    parallel = ParallelConfig(strategy="ragged_all_to_all", **SPLIT)
    single, sharded = layer_pair(rng, small_config(), make_mesh(1, 4, 1), parallel)
    x = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    ids, is_real = rng.integers(0, 8, size=(6, 2)), np.array([1, 0, 1, 1, 0, 1])
    poisoned = jnp.where(is_real[:, None] == 1, x, jnp.nan)
    y = call(sharded, poisoned, forced_ids=forced(ids), token_mask=jnp.asarray(is_real))
    expected = call(single, x, forced_ids=forced(ids))
    np.testing.assert_allclose(y[is_real == 1], expected[is_real == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["padded_all_to_all", pytest.param("ragged_all_to_all", marks=pytest.mark.slow)])
def test_mesh_with_explicit_axes_and_axes_in_another_order(strategy, rng):
    mesh = make_mesh(2, 2, 2, AxisType.Explicit)
    parallel = ParallelConfig(strategy=strategy, expert_axis=("expert", "data"), tensor_axis="tensor", data_axis="data")
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), mesh, parallel)
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    with jax.set_mesh(mesh):
        y = call(sharded, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_allclose(y, call(single, x), rtol=1e-5, atol=1e-5)
    assert y.sharding.spec == PartitionSpec("data", None, None)


@pytest.mark.parametrize("transform", [False, pytest.param(True, marks=SLOW)])
def test_unreduced_results_sum_to_the_layer_where_only_tensor_axes_are_left(transform, rng):
    parallel = ParallelConfig(strategy="padded_all_to_all", reduce_results=False, **SPLIT)
    parts = transforms() if transform else {}
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), make_mesh(1, 2, 2), parallel, **parts)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    y = call(sharded, x)
    assert sharded.reduction_plan.result_is_partial == (not transform)
    whole = y if transform else np.asarray(y, np.float64).sum(axis=0)
    np.testing.assert_allclose(whole, call(single, x), rtol=1e-5, atol=1e-5)


def test_sequences_split_over_devices_stay_there(rng):
    parallel = ParallelConfig(
        strategy="padded_all_to_all", expert_axis=("data", "expert"), data_axis="data", sequence_axis="expert"
    )
    mesh = make_mesh(2, 2, 1)
    single, sharded = layer_pair(rng, small_config(hidden_size=32, shared_experts=SHARED), mesh, parallel)
    x = jnp.asarray(rng.normal(size=(4, 6, 32)), jnp.float32)
    spread = NamedSharding(mesh, PartitionSpec("data", "expert"))
    program = jax.jit(lambda x: sharded(x), in_shardings=spread, out_shardings=spread).lower(x).compile()
    np.testing.assert_allclose(program(jax.device_put(x, spread)), call(single, x), rtol=1e-5, atol=1e-5)
    bytes_of_tokens = x.nbytes // mesh.size
    moved = [c.kind for c in read_collectives(program.as_text()) if c.operand_bytes >= bytes_of_tokens]
    assert moved == ["all-to-all"] * 2  # to the experts and back


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 4)], ids=str)
def test_tokens_keep_their_order_whether_or_not_devices_divide_rows_and_sequences_evenly(shape, rng):
    axes = LayerAxes.resolve(ParallelConfig(data_axis="data", sequence_axis="expert"), make_mesh(2, 2, 1))
    order = TokenOrder.of(shape, axes)
    tokens = jnp.asarray(rng.normal(size=(*shape, 2)), jnp.float32)
    flat = order.flatten("tokens", tokens, 1)
    np.testing.assert_array_equal(order.unflatten(flat), tokens)
    np.testing.assert_array_equal(order.unflatten(jnp.stack([flat, -flat]))[1], -tokens)
    whole = [tokens[row, part] for row in (slice(0, 2), slice(2, 4)) for part in (slice(0, 2), slice(2, 4))]
    expected = whole if shape == (4, 4) else [tokens]  # device by device, or row by row
    np.testing.assert_array_equal(flat, jnp.concatenate([block.reshape(-1, 2) for block in expected]))


TWO_GROUPS = RouterConfig(scoring="sigmoid", group_limit=GroupLimit(num_groups=2, groups_kept=1))


@pytest.mark.parametrize(
    ("strategy", "sequence_axis"),
    [
        ("padded_all_to_all", "expert"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [("padded_all_to_all", None), (None, "expert"), ("replicated", None)]
        ),
    ],
)
def test_round_robin_placement_puts_experts_of_every_group_on_every_rank(strategy, sequence_axis, rng):
    single = random_layer(rng, small_config(router=TWO_GROUPS))
    tokens = SPLIT | dict(sequence_axis=sequence_axis)
    parallel = ParallelConfig(strategy=strategy, placement_strategy="round_robin", **tokens)
    sharded = move_layer(single, make_mesh(1, 4, 1), parallel)
    slots = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of four ranks with two experts each; spec 3.5
    np.testing.assert_array_equal(initial_placement(sharded.config, sharded.axes), slots)
    assert sharded.expert_map_manager(1).get_local_expert_ids() == [1, 5]
    np.testing.assert_array_equal(sharded.replicas.logical_to_physical[...][:, 0], np.argsort(slots))
    if strategy != "replicated":
        np.testing.assert_array_equal(sharded.expert_map_manager(1).routing_tables.physical_to_global, slots)
    x = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    np.testing.assert_allclose(call(sharded, x), call(single, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "tokens", "message"),
    [
        (dict(), {}, "num_expert_group > 1"),
        (dict(router=TWO_GROUPS, num_redundant_experts=8), {}, "num_redundant_experts = 0, got 8"),
        (
            dict(router=TWO_GROUPS),
            dict(strategy="allgather_reducescatter", data_axis="expert"),
            "all2all_backend in .* got 'allgather_reducescatter'",
        ),
    ],
)
def test_round_robin_that_upstream_would_not_honour_is_refused(changes, tokens, message):
    parallel = ParallelConfig(expert_axis="expert", placement_strategy="round_robin", **tokens)
    axes = LayerAxes.resolve(parallel, make_mesh(1, 4, 1))
    with pytest.raises(ValueError, match=message):
        initial_placement(small_config(parallel=parallel, **changes), axes)


def test_ranks_with_the_same_tokens_divide_routing_too(rng):
    parallel = ParallelConfig(strategy="padded_all_to_all", expert_axis="expert", tensor_axis="tensor")
    single, sharded = layer_pair(rng, small_config(num_experts=24), make_mesh(1, 4, 1), parallel)
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    program = jax.jit(lambda x: sharded(x)).lower(x).compile()
    np.testing.assert_allclose(program(x), call(single, x), rtol=1e-5, atol=1e-5)
    rows_of_logits = re.findall(r"= f32\[(\d+),24\]\S* dot\(", program.as_text())
    assert rows_of_logits == ["4"]
