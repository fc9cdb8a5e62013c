"""Balancing a running layer: outputs stay, loads become even, nothing is compiled twice."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from oracles.layers_under_test import random_layer
from support.balanced_layers import config, logical_experts, make_mesh, plain_and_balanced

from moe_jax import GroupLimit, MoEConfig, MoERunner, ParallelConfig, RoutedExperts, RouterConfig
from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer, write_balance_picture
from moe_jax.placement import load_statistics, rank_load


@contextlib.contextmanager
def compilations():
    """The durations of everything that is traced or compiled inside."""
    durations = []

    def listen(event, duration, **_):
        if event.startswith("/jax/core/compile"):
            durations.append((event, duration))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def tokens(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@nnx.jit
def run(layer, x, forced_ids):
    return layer(x, forced_ids=forced_ids, with_aux=True)


def hot_ids(rng, num_tokens, top_k, num_experts=8, *, in_first_half=False):
    """Experts of which some are chosen far more often than others; other ones in every call.

    `in_first_half`: the popular ones are among the first half of the experts, which the same ranks hold at the beginning.
    """
    popularity = np.arange(1.0, num_experts + 1) ** -1.5
    halves = np.split(popularity, 2) if in_first_half else [popularity]
    popularity = np.concatenate([rng.permutation(half) for half in halves])
    scores = np.log(popularity) + rng.gumbel(size=(num_tokens, num_experts))
    return jnp.asarray(np.argsort(-scores, axis=1)[:, :top_k], jnp.int32)


def dispatched(strategy):
    """Tokens split over the ranks that the experts are split over."""
    return ParallelConfig(expert_axis="expert", data_axis="expert", strategy=strategy)


REPLICATED = ParallelConfig(expert_axis="expert")


@pytest.mark.parametrize(
    ("parallel", "ranks", "top_k", "redundant", "tolerance"),
    [
        pytest.param(REPLICATED, 8, 1, 8, 0, id="one expert per token"),
        pytest.param(REPLICATED, 4, 2, 0, 1e-6, id="no redundant experts", marks=pytest.mark.slow),
        *(
            pytest.param(dispatched(strategy), 4, 2, 8, 1e-6, id=strategy, marks=pytest.mark.slow)
            for strategy in ("allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all")
        ),
    ],
)
def test_outputs_stay_and_load_evens_out_when_experts_move(parallel, ranks, top_k, redundant, tolerance, rng):
    """Where each token has one expert, there is nothing to be summed in another order: the bits stay."""
    plain, layer = plain_and_balanced(rng, make_mesh(ranks), parallel, top_k=top_k, redundant=redundant)
    balancer = ExpertLoadBalancer(layer, EplbConfig(window_size=4, step_interval=4))
    x, ids = tokens(rng, 65, 6), hot_ids(rng, 65, top_k, in_first_half=True)
    before, aux = run(layer, x, ids)
    np.testing.assert_allclose(before, run(plain, x, ids)[0], rtol=1e-5, atol=1e-5)
    state = balancer.record(balancer.init(), aux.physical_load)
    assert balancer.should_rearrange(state)
    experts = logical_experts(layer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, nnx.state(layer))

    state, report = balancer.rearrange(layer, state)
    after, aux = run(layer, x, ids)
    np.testing.assert_allclose(after, before, rtol=0, atol=tolerance * np.abs(before).max())
    for name, values in logical_experts(layer).items():
        np.testing.assert_array_equal(values, experts[name])
    assert jax.tree.map(lambda leaf: leaf.sharding, nnx.state(layer)) == shardings
    assert report.sent > 0
    np.testing.assert_array_equal(report.new_physical_to_logical[0], layer.replicas.physical_to_logical[...])
    np.testing.assert_array_equal(report.logical_load[0], np.bincount(np.ravel(ids), minlength=8))
    assert not balancer.should_rearrange(state)

    loads = rank_load(np.asarray(aux.physical_load)[None], ranks)
    assert loads.sum() == 65 * top_k
    if redundant:
        assert load_statistics(loads).balancedness > report.before.balancedness


def test_a_second_rearrangement_compiles_nothing(rng):
    _, layer = plain_and_balanced(rng, make_mesh(8))
    balancer = ExpertLoadBalancer(layer, EplbConfig(window_size=2))
    optimizer = nnx.Optimizer(layer, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    record = jax.jit(balancer.record)
    state = balancer.init()
    x = tokens(rng, 33, 6)
    placements, compiled = [], []
    for _ in range(4):
        with compilations() as durations:
            _, aux = run(layer, x, hot_ids(rng, 33, 2))
            state = record(state, aux.physical_load)
            state, report, same = balancer.rearrange(layer, state, optimizer)
        assert same is optimizer
        placements.append(report.new_physical_to_logical)
        compiled.append(len(durations))
    assert (placements[-1] != placements[-2]).any()
    assert compiled[0] > 0  # the listener hears
    assert compiled[2:] == [0, 0], durations


@pytest.mark.parametrize("top_k", [1, *(pytest.param(top_k, marks=pytest.mark.slow) for top_k in (2, 8))])
def test_zipf_routing_is_even_after_one_rearrangement(top_k, rng):
    """Zipf(1.2) over 64 experts, 16 redundant ones, 8 ranks: a fresh draw loads no rank 10 % above the mean."""
    experts, num_tokens = 64, 32768
    settings = MoEConfig(
        hidden_size=2,
        intermediate_size=1,
        num_experts=experts,
        top_k=top_k,
        num_redundant_experts=16,
        parallel=ParallelConfig(expert_axis="expert"),
    )
    layer = random_layer(rng, settings, mesh=make_mesh(8))
    balancer = ExpertLoadBalancer(layer, EplbConfig(window_size=4))
    popularity = rng.permutation(np.arange(1.0, experts + 1) ** -1.2)
    # The output isn't returned, so the experts are not run.
    physical_load = nnx.jit(lambda layer, x, ids: layer(x, forced_ids=ids, with_aux=True)[1].physical_load)

    def draw():
        scores = np.log(popularity) + rng.gumbel(size=(num_tokens, experts))
        ids = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
        return physical_load(layer, jnp.zeros((num_tokens, 2)), jnp.asarray(ids, jnp.int32))

    state = balancer.init()
    for _ in range(4):
        state = balancer.record(state, draw())
    state, report = balancer.rearrange(layer, state)
    loads = rank_load(np.asarray(draw())[None], 8)
    assert 1 / report.before.balancedness > 1.2
    assert loads.max() / loads.mean() <= 1.10


def test_padding_is_not_counted(rng):
    _, layer = plain_and_balanced(rng, make_mesh(2), top_k=2)
    mask = jnp.asarray(rng.integers(2, size=17), bool)
    _, aux = nnx.jit(lambda layer, x, mask: layer(x, token_mask=mask, with_aux=True))(layer, tokens(rng, 17, 6), mask)
    assert aux.physical_load.sum() == 2 * mask.sum()
    placement = np.asarray(layer.replicas.physical_to_logical[...])
    np.testing.assert_array_equal(np.bincount(placement, aux.physical_load, 8), aux.expert_load)


def test_an_optax_state_moves_along(rng):
    _, layer = plain_and_balanced(rng, make_mesh(4), redundant=4)
    balancer = ExpertLoadBalancer(layer)
    moments = optax.adam(1e-2).init(nnx.state(layer, nnx.Param))
    moments = jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else tokens(rng, *leaf.shape), moments)
    old = jax.tree.map(np.array, moments)
    placement = rng.permutation(balancer.physical_to_logical(layer)[0])[None]
    moves, new = balancer.place(layer, placement, moments)
    for part in ("mu", "nu"):
        before, after = getattr(old[0], part), getattr(new[0], part)
        for name, values in after["routed_experts"].items():
            expected = np.asarray(before["routed_experts"][name][...])[moves.source[0]]
            np.testing.assert_array_equal(values[...], expected)
        np.testing.assert_array_equal(after["router"]["weight"][...], before["router"]["weight"][...])


def test_a_fresh_layer_has_equal_copies():
    experts = RoutedExperts(config(num_redundant_experts=5), kernel_init=jax.random.normal, rngs=nnx.Rngs(0))
    for name in ("gate_up_proj", "down_proj"):
        values = np.asarray(getattr(experts, name)[...])
        np.testing.assert_array_equal(values[8:], values[:5])
        assert len(np.unique(values[:8])) == values[:8].size


def test_balance_is_drawn(rng, tmp_path):
    layer = random_layer(rng, config(num_redundant_experts=4))
    balancer = ExpertLoadBalancer(layer)
    state = balancer.record(balancer.init(), jnp.asarray(rng.integers(1, 100, size=12), jnp.int32))
    before = balancer.statistics(state)
    _, report = balancer.rearrange(layer, state)
    assert report.before == before
    # Of one rank nothing is sent.
    assert (report.sent, report.copied) == (0, (report.old_physical_to_logical != report.new_physical_to_logical).sum())
    assert str(report).startswith(f"balancedness {before.balancedness:.3f} -> {report.after.balancedness:.3f}")
    write_balance_picture(tmp_path / "balance.png", report)
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_recorded_is_on_every_device_of_the_layer(rng):
    mesh = make_mesh(4)
    _, layer = plain_and_balanced(rng, mesh)
    for leaf in jax.tree.leaves(ExpertLoadBalancer(layer).init()):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), leaf.ndim)


@pytest.mark.parametrize("redundant", [0, 8])
def test_placement_tables_are_on_every_device_of_the_layer(redundant, rng):
    """So that a state with them can be stored, and put back into the layer."""
    mesh = make_mesh(4)
    _, layer = plain_and_balanced(rng, mesh, redundant=redundant)
    ExpertLoadBalancer(layer)
    for table in jax.tree.leaves(nnx.state(layer.replicas)):
        assert table.sharding == NamedSharding(mesh, PartitionSpec())


def test_experts_of_a_group_share_a_machine_and_those_that_stay_on_their_rank_keep_their_slot(rng):
    groups, machines, ranks = 4, 2, 4
    settings = config(
        num_experts=16,
        num_redundant_experts=4,
        router=RouterConfig(scoring="sigmoid", group_limit=GroupLimit(num_groups=groups, groups_kept=2)),
        parallel=REPLICATED,
    )
    layer = random_layer(rng, settings, mesh=make_mesh(ranks))
    balancer = ExpertLoadBalancer(layer, EplbConfig(window_size=1, num_nodes=machines))
    for _ in range(2):
        before = balancer.physical_to_logical(layer).reshape(ranks, 5)
        load = rng.permutation(np.arange(1, 21) ** 2)[None]
        state = balancer.record(balancer.init(), jnp.asarray(load, jnp.int32))
        statistics = balancer.statistics(state)
        _, report = balancer.rearrange(layer, state)
        assert statistics == report.before == load_statistics(load.reshape(1, ranks, 5).sum(axis=2))
        after = report.new_physical_to_logical.reshape(ranks, 5)
        machine_of = np.arange(20) // 10
        for group in range(groups):
            assert len(set(machine_of[after.ravel() // 4 == group])) == 1
        for old, new in zip(before, after, strict=True):
            for expert in set(old) & set(new):
                assert np.sum((old == expert) & (new == expert)) == min(np.sum(old == expert), np.sum(new == expert))
        expected = np.bincount(before.ravel(), load[0]) / np.bincount(after.ravel())  # of each copy
        np.testing.assert_allclose(report.rank_load_before[0], load.reshape(ranks, 5).sum(axis=1))
        np.testing.assert_allclose(report.rank_load_after[0], expected[after].sum(axis=1))


def test_machines_that_do_not_divide_the_ranks_are_taken_for_one():
    layer = nnx.eval_shape(lambda: MoERunner(config(num_redundant_experts=2), rngs=nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="num_nodes=2 doesn't divide the 1 ranks"):
        assert ExpertLoadBalancer(layer, EplbConfig(num_nodes=2)).num_nodes == 1


class TwoLayers(nnx.Module):
    def __init__(self, *layers):
        self.layers = nnx.List(layers)


def test_what_cannot_be_balanced_is_refused(rng):
    def layer(**changes):
        return random_layer(rng, config(**changes))

    with pytest.raises(ValueError, match="must have a MoERunner, got Linear without any"):
        ExpertLoadBalancer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"equal numbers of .*got \(8, 8, 1, 1\), \(8, 10, 1, 1\)"):
        ExpertLoadBalancer(TwoLayers(layer(), layer(num_redundant_experts=2)))
    single = layer(num_redundant_experts=2)
    balancer = ExpertLoadBalancer(single)
    with pytest.raises(ValueError, match="needs recorded load, got a state with num_recorded = 0"):
        balancer.rearrange(single, balancer.init())
    wrong = {"routed_experts": {"down_proj": jnp.zeros((3, 4))}}
    with pytest.raises(ValueError, match=r"axis 0 of routed_experts.down_proj must be that of the 10 physical experts"):
        balancer.sum_replica_gradients(single, wrong)


def test_layers_of_any_module_are_balanced_in_their_order(rng):
    model = TwoLayers(*(random_layer(rng, config(num_redundant_experts=2)) for _ in range(2)))
    balancer = ExpertLoadBalancer(model)
    assert [layers.path for layers in balancer.layers] == [("layers", 0), ("layers", 1)]
    weights = [np.asarray(layer.routed_experts.down_proj[...]) for layer in model.layers]
    placement = np.stack([rng.permutation(row) for row in balancer.physical_to_logical(model)])
    moves, *_ = balancer.place(model, placement)
    for index, layer in enumerate(model.layers):
        np.testing.assert_array_equal(layer.routed_experts.down_proj[...], weights[index][moves.source[index]])
        np.testing.assert_array_equal(layer.replicas.physical_to_logical[...], placement[index])
