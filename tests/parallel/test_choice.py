"""Mesh axes and dispatch strategies: what each axis does, which strategy is chosen, and why no other."""

import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from support.sharded_layers import SHARED, make_mesh, small_config

from moe_jax import MoEConfig, MoERunner, ParallelConfig
from moe_jax.parallel import LayerAxes
from moe_jax.parallel.choice import STRATEGIES, choose_strategy
from moe_jax.parallel.dispatch import DispatchRequest

VLLM_TABLE = [
    # tp, dp, expert parallel -> tensor ranks, expert ranks, rank of each [dp, tp] in the group that is not one; spec 1.8
    (2, 1, False, 2, 1, [[0, 1]]),
    (1, 2, False, 2, 1, [[0], [1]]),
    (2, 2, False, 4, 1, [[0, 1], [2, 3]]),
    (2, 1, True, 1, 2, [[0, 1]]),
    (1, 2, True, 1, 2, [[0], [1]]),
    (2, 2, True, 1, 4, [[0, 1], [2, 3]]),
]


@pytest.mark.parametrize(("tp", "dp", "enable_ep", "tensor", "expert", "ranks"), VLLM_TABLE, ids=str)
def test_parallel_sizes_become_the_axes_of_upstreams_table(tp, dp, enable_ep, tensor, expert, ranks):
    mesh = jax.make_mesh((dp, tp), ("dp", "tp"), (AxisType.Auto,) * 2, devices=jax.devices()[: dp * tp])
    axes = LayerAxes.resolve(ParallelConfig.from_vllm(tp, dp, enable_ep), mesh)
    assert (axes.size(axes.tensor), axes.size(axes.expert)) == (tensor, expert)
    assert axes.size(axes.tokens) == dp
    positions = axes.shard_map(lambda: axes.position(axes.reduce)[None, None], (), PartitionSpec("dp", "tp"))()
    np.testing.assert_array_equal(positions, ranks)


def test_context_and_sequence_parallel_ranks_hold_different_tokens():
    config = ParallelConfig.from_vllm(4, 2, True, pcp=2, sequence_parallel=True, micro_batches=2)
    assert config == ParallelConfig(
        expert_axis=("dp", "pcp", "tp"), data_axis=("dp",), sequence_axis=("pcp", "tp"), micro_batches=2
    )
    assert ParallelConfig.from_vllm(1, 1, True) == ParallelConfig()
    with pytest.raises(ValueError, match="sequence_parallel needs enable_ep=True, got False"):
        ParallelConfig.from_vllm(2, sequence_parallel=True)
    with pytest.raises(ValueError, match="pcp must be positive, got 0"):
        ParallelConfig.from_vllm(2, pcp=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("strategy", "magic", "strategy must be one of 'replicated', .* or None; got 'magic'"),
        ("placement_strategy", "random", "placement_strategy must be 'linear' or 'round_robin', got 'random'"),
        ("capacity_factor", 0.0, "capacity_factor must be positive and finite, or None; got 0.0"),
        ("micro_batches", 3, "micro_batches must be 1 or 2, got 3"),
    ],
)
def test_illegal_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**{field: value})


def fake_mesh(platform="tpu", hosts=1, **sizes):
    """As much of a mesh as the choice looks at."""
    per_host = int(np.prod(list(sizes.values()))) // hosts
    devices = [
        types.SimpleNamespace(platform=platform, slice_index=host, process_index=0)
        for host in range(hosts)
        for _ in range(per_host)
    ]
    return types.SimpleNamespace(axis_names=tuple(sizes), shape=sizes, devices=np.array(devices, object))


def request_for(mesh, num_tokens=4096, top_k=8, **parallel):
    config = MoEConfig(
        hidden_size=256, intermediate_size=256, num_experts=256, top_k=top_k, parallel=ParallelConfig(**parallel)
    )
    return DispatchRequest(axes=LayerAxes.resolve(config.parallel, mesh), config=config, num_tokens=num_tokens)


def choice(mesh, **given):
    return choose_strategy(request_for(mesh, **given))[1]


EP = dict(expert_axis="ep", data_axis="ep")


@pytest.mark.parametrize(
    ("mesh", "parallel", "chosen"),
    [
        # Tokens on every rank stay there, as upstream, unless an option asks for rows to travel.
        (fake_mesh(ep=64), dict(expert_axis="ep"), "replicated"),
        (fake_mesh(tp=8), dict(tensor_axis="tp"), "replicated"),
        (fake_mesh(ep=8), dict(expert_axis="ep", one_row_per_rank=True), "ragged_all_to_all"),
        (fake_mesh(ep=64), dict(expert_axis="ep", micro_batches=2), "ragged_all_to_all"),
        # Two ranks: sending all tokens to the other one moves fewer rows than one for each expert.
        (fake_mesh(ep=2), EP, "allgather_reducescatter"),
        (fake_mesh(ep=64), EP, "ragged_all_to_all"),
        (fake_mesh(ep=4), EP | dict(one_row_per_rank=True), "ragged_all_to_all"),
        # Only one strategy has a capacity.
        (fake_mesh(ep=8), EP | dict(capacity_factor=1.25), "padded_all_to_all"),
        # CPUs emulate the ragged collective, and XLA decomposes it between GPU hosts.
        (fake_mesh("cpu", ep=16), EP, "allgather_reducescatter"),
        (fake_mesh("cuda", ep=16), EP, "ragged_all_to_all"),
        (fake_mesh("cuda", hosts=2, ep=16), EP, "allgather_reducescatter"),
        (fake_mesh("rocm", hosts=2, ep=16), EP, "allgather_reducescatter"),
        (fake_mesh(dp=2), dict(tensor_axis="dp", data_axis="dp"), "allgather_reducescatter"),
    ],
)
def test_tokens_stay_or_move_as_few_rows_as_possible(mesh, parallel, chosen):
    assert choice(mesh, **parallel).implementation == chosen


@pytest.mark.parametrize(
    ("mesh", "axes", "num_tokens", "rows"),
    [
        # Everyone has the 100 tokens, and 1/8 of their results. All-to-all strategies divide them among the 4 expert ranks: of 25
        # tokens 3/4 of 8 rows there and back (or room for 25 tokens on each of 3 ranks), sums over 2 ranks, and 3 other slices.
        (
            fake_mesh(ep=4, tp=2),
            dict(expert_axis="ep", tensor_axis="tp"),
            100,
            dict(
                replicated=2 * 100 * 7 / 8,
                allgather_reducescatter=2 * 100 * 7 / 8,
                ragged_all_to_all=2 * 25 * 6 + 2 * 25 / 2 + 3 * 25,
                padded_all_to_all=2 * 25 * 8 * 3 + 2 * 25 / 2 + 3 * 25,
            ),
        ),
        # 26 tokens per rank at most: 3 other ranks get them. All-to-all strategies first swap them between 2 tensor ranks.
        (
            fake_mesh(ep=2, tp=2),
            dict(expert_axis="ep", tensor_axis="tp", data_axis=("ep", "tp")),
            101,
            dict(
                allgather_reducescatter=2 * 26 * 3,
                ragged_all_to_all=2 * 52 * 4 + 2 * 26,
                padded_all_to_all=2 * 52 * 8 + 2 * 26,
            ),
        ),
        # 51 tokens per data position at most, 13 of them for each of 4 expert ranks.
        (
            fake_mesh(dp=2, ep=4),
            dict(expert_axis="ep", data_axis="dp"),
            101,
            dict(replicated=2 * 51 * 3 / 4, ragged_all_to_all=2 * 13 * 6 + 3 * 13),
        ),
        # Room for all rows that 8 tokens can have goes to the other host, and to 3 of the 4 ranks there.
        (fake_mesh("cuda", hosts=2, ep=8), EP, 64, dict(ragged_all_to_all=2 * 64 * (1 + 3 / 4))),
        (
            fake_mesh("cuda", hosts=2, ep=8),
            EP | dict(buffer_factor=0.5),
            64,
            dict(ragged_all_to_all=2 * 2 * 64 * (1 + 3 / 4)),  # in two rounds
        ),
    ],
)
def test_strategies_expect_to_send_what_their_collectives_move(mesh, axes, num_tokens, rows):
    request = request_for(mesh, num_tokens=num_tokens, **axes)
    given = {strategy.NAME: strategy.rows_moved(request) for strategy in STRATEGIES if strategy.NAME in rows}
    assert given == pytest.approx(rows)


def test_the_choice_says_what_each_strategy_would_send_or_why_it_cannot_run():
    # 512 tokens per rank, 8 choices, 8 ranks: 7/8 of 4096 rows there and back, or 512 * 7 tokens there and back.
    assert str(choice(fake_mesh(ep=8), **EP)).splitlines() == [
        "dispatch: allgather_reducescatter, 4096 tokens over 8 expert positions, 1 tensor positions, 8 token positions "
        "of tpu; it is expected to send 7168.0 rows per rank",
        "  because it is expected to send the fewest rows",
        "  not replicated: it needs every token on all ranks among which the experts are split, so tokens must not be "
        "split over an axis that splits experts, got 'ep'",
        "  not ragged_all_to_all: it is expected to send 7168.0 rows per rank",
        "  not padded_all_to_all: it is expected to send 57344.0 rows per rank",
        "  not remote_dma: it runs only if it is asked for by name: its buffers have room for the worst case, and no chip has "
        "run its kernel yet",
    ]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (EP | dict(strategy="replicated"), "'replicated' cannot run: it needs every token on all ranks .* got 'ep'"),
        (dict(tensor_axis="ep", strategy="ragged_all_to_all"), "expert_axis must be set, got None"),
        (EP | dict(strategy="ragged_all_to_all", capacity_factor=2.0), "capacity_factor must be None, got 2.0"),
        (
            EP | dict(strategy="allgather_reducescatter", one_row_per_rank=True),
            "one_row_per_rank must be False, got True",
        ),
        (dict(expert_axis="ep", strategy="replicated", micro_batches=2), "micro_batches must be 1, got 2"),
        (
            dict(expert_axis="ep", strategy="padded_all_to_all", reduce_results=False),
            "reduce_results must be True, got False",
        ),
        (
            dict(tensor_axis="ep", capacity_factor=1.0),
            "no dispatch strategy can run: replicated: it has no capacity.* padded_all_to_all: .*expert_axis must be set",
        ),
    ],
)
def test_a_strategy_that_cannot_do_what_is_asked_says_why(parallel, message):
    with pytest.raises(NotImplementedError, match=message):
        choice(fake_mesh(ep=8), **parallel)


def test_a_layer_shows_and_explains_its_dispatch():
    config = small_config(shared_experts=SHARED, parallel=ParallelConfig(expert_axis="expert", data_axis="expert"))
    layer = nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=make_mesh(1, 8, 1)))
    assert layer.explain_dispatch(64).implementation == "allgather_reducescatter"
    assert "dispatch_strategy='chosen by number of tokens'" in repr(layer)
    with pytest.raises(ValueError, match="built with mesh=None"):
        nnx.eval_shape(lambda: MoERunner(small_config(), rngs=nnx.Rngs(0))).explain_dispatch(64)


def test_shared_experts_are_split_only_among_ranks_with_the_same_tokens():
    mesh = make_mesh(2, 2, 2)
    for parallel, parts in (
        (dict(expert_axis=("data", "expert"), tensor_axis="tensor", data_axis="data"), 4),
        (dict(expert_axis=("data", "expert"), tensor_axis="tensor", data_axis=("data", "expert")), 2),
        (dict(expert_axis=("data", "expert", "tensor"), data_axis=("data", "expert", "tensor")), 1),
    ):
        config = small_config(shared_experts=SHARED, parallel=ParallelConfig(**parallel))
        layer = nnx.eval_shape(lambda config=config: MoERunner(config, rngs=nnx.Rngs(0), mesh=mesh))
        kernel = layer.partition_specs()["shared_experts"]["up_proj"]["kernel"]
        names = kernel[1] or ()
        assert layer.axes.size(names if isinstance(names, tuple) else (names,)) == parts
        assert layer.partition_specs()["routed_experts"]["gate_up_proj"][0] == parallel["expert_axis"]
