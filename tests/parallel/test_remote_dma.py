"""The strategy whose kernel moves rows itself: a layer on a mesh of simulated TPUs equals the layer on one device.

Its kernel takes sizes that are multiples of 128, and runs only in interpret mode here, so it has cases of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import random_layer
from support.dispatch_cases import TOKENS
from support.sharded_layers import assert_equal_results, make_mesh, sharded_like, value_and_gradients
from support.tpu_interpretation import interpreting_tpu

from moe_jax import MoEConfig, MoERunner, ParallelConfig, SharedExpertsConfig
from moe_jax.kernels.device import TPU_DEVICES, targeting
from moe_jax.parallel import remote_dma
from moe_jax.parallel.axes import LayerAxes
from moe_jax.parallel.dispatch import DispatchRequest
from moe_jax.parallel.layer_parts import routed_partials

SHARED = SharedExpertsConfig(intermediate_size=8, sigmoid_gate=True)
SPLIT = TOKENS["split over the expert axis"]

CASES = {
    # where tokens are; ranks of data, expert and tensor axes; the layer
    "two ranks": (SPLIT, (1, 2, 1), dict()),
    "tokens on all ranks, redundancy": (
        TOKENS["on all ranks of an expert axis"],
        (1, 4, 1),
        dict(num_experts=6, num_redundant_experts=2),
    ),
    "as in vLLM, tensors split": (TOKENS["as in vLLM"], (2, 2, 2), dict(shared_experts=SHARED)),
    "tensor ranks with other tokens": (TOKENS["split over a tensor axis"], (2, 2, 1), dict()),
    "weights on the input": (SPLIT, (1, 4, 1), dict(apply_router_weight_on_input=True, top_k=1)),
}
QUICK_CASES = ("two ranks", "as in vLLM, tensors split", "weights on the input")


def layer_config(**changes) -> MoEConfig:
    base = dict(hidden_size=128, intermediate_size=256, num_experts=8, top_k=3, expert_bias=True)
    return MoEConfig(**(base | changes))


def on_mesh(single, mesh, **options):
    """The layer on a mesh; to be built and called within the same `interpreting_tpu`."""
    return sharded_like(single, mesh, ParallelConfig(strategy="remote_dma", **options))


@nnx.jit
def forward(layer, x):
    return layer(x, with_aux=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_CASES else pytest.mark.slow) for name in CASES]
)
def test_layer_on_a_mesh_equals_the_layer_on_one_device(name, rng):
    tokens, sizes, changes = CASES[name]
    single = random_layer(rng, layer_config(**changes), scale=0.1)
    x = jnp.asarray(rng.normal(size=(1, 5, 128)), jnp.float32)  # some ranks have fewer tokens than others, or none
    expected, expected_aux = forward(single, x)
    with interpreting_tpu(num_devices=int(np.prod(sizes))) as seen:
        sharded = on_mesh(single, make_mesh(*sizes), **tokens)
        result, aux = jax.block_until_ready(forward(sharded, x))
    assert seen.num_kernels
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(aux.topk_ids, expected_aux.topk_ids)
    np.testing.assert_array_equal(aux.expert_load, expected_aux.expert_load)
    physical = aux.topk_ids[0] if sharded.replicas is None else np.asarray(sharded.replicas(aux.topk_ids[0]))
    assert aux.sent_rows.tolist() == count_sent_rows(physical, sharded.axes, sharded.config)
    assert aux.dropped_rows == 0


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_gradients_are_those_of_the_layer_on_one_device(tensor, rng):
    single = random_layer(rng, layer_config(shared_experts=SHARED), scale=0.1)
    x, direction = (jnp.asarray(rng.normal(size=(1, 5, 128)), jnp.float32) for _ in range(2))
    expected = value_and_gradients(single, x, direction)
    with interpreting_tpu(num_devices=2 * tensor):
        sharded = on_mesh(single, make_mesh(1, 2, tensor), **SPLIT)
        aux = assert_equal_results(expected, jax.block_until_ready(value_and_gradients(sharded, x, direction)))
    assert aux.dropped_rows == 0


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_experts_of_a_stack_of_layers_are_computed_where_they_lie(dtype, rng):
    config = layer_config(dtype=dtype, param_dtype=dtype, parallel=ParallelConfig(strategy="remote_dma", **SPLIT))
    x = jnp.asarray(rng.normal(size=(6, 128)), dtype)
    ids = jnp.asarray(rng.integers(0, 8, size=(6, 3)), jnp.int32)
    topk_weights = jnp.asarray(rng.uniform(0.1, 1, size=(6, 3)), jnp.float32)
    with interpreting_tpu(num_devices=2):
        layer = random_layer(rng, config, scale=0.1, mesh=make_mesh(1, 2, 1))
        weights, compute = layer.routed_experts.weights(), layer.routed_experts.computation
        stacked = {
            name: jnp.stack([jnp.full_like(getattr(weights, name), jnp.nan), getattr(weights, name)])
            for name in ("gate_up_proj", "down_proj")
        }
        dispatch = layer._dispatch(layer.axes, num_tokens=6)
        alone, of_stack = (
            np.asarray(routed_partials(dispatch, compute, x, topk_weights, ids, each).partials.astype(jnp.float32))
            for each in (weights, weights._replace(**stacked, layer=jnp.int32(1)))
        )
    assert np.isfinite(alone).all()
    np.testing.assert_array_equal(of_stack, alone)


def choice(num_tokens=64, mesh=(1, 8, 1), **options):
    """What a layer on a mesh of v6e chooses."""
    changes = {
        name: options.pop(name) for name in ("hidden_size", "intermediate_size", "implementation") if name in options
    }
    with targeting(TPU_DEVICES["v6e"]):
        config = layer_config(parallel=ParallelConfig(**{**SPLIT, **options}), **changes)
        layer = nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=make_mesh(*mesh)))
        return layer.explain_dispatch(num_tokens)


def test_it_runs_only_if_it_is_asked_for_by_name():
    assert choice(strategy="remote_dma").implementation == "remote_dma"
    reasons = dict(choice().rejected)
    assert reasons["remote_dma"].startswith(
        "it runs only if it is asked for by name: its buffers have room for the worst"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(one_row_per_rank=True), "one_row_per_rank must be False, got True"),
        (dict(micro_batches=2), "micro_batches must be 1, got 2"),
        (dict(capacity_factor=1.0), "capacity_factor must be None, got 1.0"),
        (dict(buffer_factor=1.0), "buffer_factor must be None, got 1.0"),
        (dict(expert_axis=None), "expert_axis must be set, got None"),
        (dict(implementation="xla"), "implementation must be that or None, got 'xla'"),
        (dict(hidden_size=192), "H must be a positive multiple of 128, for copies to other chips, got 192"),
        (dict(mesh=(1, 2, 4)), "I must be a positive multiple of 128, for copies to other chips, got 64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_it_cannot_do_is_said(options, reason):
    with pytest.raises(NotImplementedError, match=f"'remote_dma' cannot run: .*{reason}"):
        choice(strategy="remote_dma", **options)


def test_without_a_tpu_it_says_so():
    config = layer_config(parallel=ParallelConfig(strategy="remote_dma", **SPLIT))
    with pytest.raises(NotImplementedError, match="it needs a TPU v5e, v5p, v6e or 7x, the platform is 'cpu'"):
        nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=make_mesh(1, 2, 1)))


def test_fused_shared_experts_are_refused():
    shared = SharedExpertsConfig(intermediate_size=256, bias=True)
    config = layer_config(
        shared_experts=shared, fuse_shared_experts=True, parallel=ParallelConfig(strategy="remote_dma", **SPLIT)
    )
    with (
        targeting(TPU_DEVICES["v6e"]),
        pytest.raises(NotImplementedError, match="fuse_shared_experts must be False, got True"),
    ):
        nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0), mesh=make_mesh(1, 2, 1)))


def test_padded_blocks_are_expected_to_have_the_rows_that_they_have(rng):
    # 256 experts, 8 ranks: a rank's 512 tokens with 8 choices fill 16 rows of each expert's block on average.
    config = MoEConfig(
        hidden_size=128, intermediate_size=128, num_experts=256, top_k=8, parallel=ParallelConfig(**SPLIT)
    )
    for num_tokens in (8 * 2, 8 * 64, 8 * 512):
        axes = LayerAxes.resolve(config.parallel, make_mesh(1, 8, 1))
        expected = remote_dma.rows_moved(DispatchRequest(axes=axes, config=config, num_tokens=num_tokens))
        sizes = rng.multinomial(num_tokens, np.full(256, 1 / 256), size=2000)[
            :, 32:
        ]  # 8 choices of an eighth of the tokens
        assert expected == pytest.approx(2 * np.mean(np.sum(-(-sizes // 16) * 16, axis=1)), rel=0.01)
