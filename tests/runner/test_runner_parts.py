"""Parts of a layer: replaced after construction, and refused where they do not belong to its config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.layers_under_test import call, random_layer

from moe_jax import (
    MoEConfig,
    MoERunner,
    ParallelConfig,
    RoutedExperts,
    RouterConfig,
    SharedExperts,
    SharedExpertsConfig,
)
from moe_jax.placement import ExpertMapManager, ParallelRanks
from moe_jax.routing import Router


def config(**changes) -> MoEConfig:
    base = dict(hidden_size=6, intermediate_size=8, num_experts=8, top_k=2, implementation="reference")
    return MoEConfig(**(base | changes))


def test_a_transform_may_become_a_function_then_a_module_then_nothing(rng):
    layer = random_layer(rng, config())
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    plain = call(layer, x)
    expected = call(layer, jnp.tanh(x))
    layer.routed_input_transform = jnp.tanh
    np.testing.assert_allclose(call(layer, x), expected, rtol=1e-5, atol=1e-6)
    linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    layer.routed_input_transform = linear
    np.testing.assert_array_equal(nnx.to_pure_dict(nnx.state(layer))["routed_input_transform"]["kernel"], linear.kernel)
    transformed = call(layer, x)
    layer.routed_input_transform = None
    np.testing.assert_array_equal(call(layer, x), plain)
    np.testing.assert_allclose(transformed, call(layer, linear(x)), rtol=1e-5, atol=1e-6)


SCALING = RouterConfig(routed_scaling_factor=2.5)
SCALED_LATER = dataclasses.replace(SCALING, apply_scale_to_output=True)


@pytest.mark.parametrize(
    ("of_layer", "of_part", "message"),
    [
        (dict(router=SCALED_LATER), dict(router=SCALING), "its router is .*apply_scale_to_output=False"),
        (dict(router=SCALING), dict(router=SCALED_LATER), "its router is .*apply_scale_to_output=True"),
        (dict(), dict(num_experts=4), "its num_experts is 4, that of the config 8"),
        (dict(), dict(top_k=1), "its top_k is 1, that of the config 2"),
    ],
)
def test_a_router_built_for_another_config_is_refused(of_layer, of_part, message):
    def build():
        router = Router(config(**of_part), rngs=nnx.Rngs(0))
        return MoERunner(config(**of_layer), router=router, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=f"router must be built for the layer's config: {message}"):
        nnx.eval_shape(build)


@pytest.mark.parametrize(
    ("of_part", "message"),
    [
        (dict(num_experts=4), "its number of physical experts is 4, that of the config 8"),
        (dict(num_redundant_experts=8), "its number of physical experts is 16, that of the config 8"),
        (dict(activation="gelu"), "its computation is .*gelu"),
    ],
)
def test_experts_built_for_another_config_are_refused(of_part, message):
    def build():
        experts = RoutedExperts(config(**of_part), rngs=nnx.Rngs(0))
        return MoERunner(config(), routed_experts=experts, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=f"routed_experts must be built for the layer's config: {message}"):
        nnx.eval_shape(build)


def test_parts_for_another_config_are_refused_after_construction_too():
    layer = nnx.eval_shape(lambda: MoERunner(config(router=SCALED_LATER), rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    nnx.eval_shape(lambda layer, x: layer(x), layer, x)
    own_router, own_experts = layer.router, layer.routed_experts

    layer.router = nnx.eval_shape(lambda: Router(config(router=SCALING), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="router must be built for the layer's config: its router is"):
        nnx.eval_shape(lambda layer, x: layer(x), layer, x)
    layer.router = own_router

    layer.routed_experts = nnx.eval_shape(lambda: RoutedExperts(config(num_experts=4), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="its number of physical experts is 4, that of the config 8"):
        nnx.eval_shape(lambda layer, x: layer(x), layer, x)

    manager = ExpertMapManager(global_num_experts=8, ranks=ParallelRanks(ep_size=2, ep_rank=0, use_ep=True))
    layer.routed_experts = nnx.eval_shape(lambda: RoutedExperts(config(), expert_map_manager=manager, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="got those of rank 0 of 2"):
        nnx.eval_shape(lambda layer, x: layer(x), layer, x)
    layer.routed_experts = own_experts
    nnx.eval_shape(lambda layer, x: layer(x), layer, x)


@pytest.mark.parametrize(
    ("manager", "message"),
    [
        (dict(global_num_experts=4), "must place the config's 8 physical experts, got one for 4"),
        (dict(global_num_experts=8, num_fused_shared_experts=1), "must have num_fused_shared_experts=0, got 1"),
        (dict(global_num_experts=8, ranks=ParallelRanks(tp_size=2)), "must have tp_size=1, got 2"),
    ],
)
def test_a_placement_that_experts_cannot_hold_is_refused(manager, message):
    with pytest.raises(ValueError, match=f"expert_map_manager {message}"):
        RoutedExperts(config(), expert_map_manager=ExpertMapManager(**manager), rngs=nnx.Rngs(0))


def test_copies_of_an_expert_start_equal_on_every_rank():
    drawn = RoutedExperts(config(num_redundant_experts=4), rngs=nnx.Rngs(0)).down_proj[...]
    for rank in range(3):
        manager = ExpertMapManager(
            global_num_experts=12, ranks=ParallelRanks(ep_size=3, ep_rank=rank, use_ep=True), num_redundant_experts=4
        )
        experts = RoutedExperts(config(num_redundant_experts=4), expert_map_manager=manager, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(experts.down_proj[...], drawn[manager.expert_map >= 0])


def test_results_of_all_ranks_add_up_even_if_some_have_no_expert(rng):
    few = config(num_experts=2)
    whole = random_layer(rng, few).routed_experts
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(5, 6), (5, 2)])
    ids = jnp.asarray(rng.integers(-1, 4, size=(5, 2)), jnp.int32)  # two experts, and ids of none
    total = 0
    for rank in range(3):
        manager = ExpertMapManager(global_num_experts=2, ranks=ParallelRanks(ep_size=3, ep_rank=rank, use_ep=True))
        part = RoutedExperts(few, expert_map_manager=manager, rngs=nnx.Rngs(0))
        for name in ("gate_up_proj", "down_proj"):
            getattr(part, name).set_value(getattr(whole, name)[...][manager.expert_map >= 0])
        assert part.num_local_experts == (1, 1, 0)[rank]
        total += call(part, x, weights, ids)
    np.testing.assert_allclose(total, call(whole, x, weights, ids), rtol=1e-5, atol=1e-6)


def test_an_input_of_shared_experts_needs_shared_experts():
    layer = nnx.eval_shape(lambda: MoERunner(config(), rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    with pytest.raises(ValueError, match="shared_experts_input needs shared experts, and the layer has none"):
        nnx.eval_shape(lambda layer, x: layer(x, shared_experts_input=x), layer, x)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_layers_of_integers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be floating, got int32"):
        config(**{name: jnp.int32})


@pytest.mark.parametrize("expert_bias", [False, True])
def test_float32_experts_of_a_bfloat16_layer_have_gradients_that_were_never_rounded(expert_bias, rng):
    layer = random_layer(rng, config(dtype=jnp.bfloat16, expert_bias=expert_bias))
    x = jnp.asarray(rng.normal(size=(20, 6)), jnp.float32)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32) ** 2))(layer).routed_experts
    for name in ("gate_up_proj", "down_proj"):
        gradient = getattr(gradients, name)[...]
        assert gradient.dtype == jnp.float32
        is_rounded = gradient == gradient.astype(jnp.bfloat16)
        assert np.mean(is_rounded[gradient != 0]) < 0.1  # an expert may have no token


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("wrong", ["one id", "all ids"])
def test_an_id_that_no_expert_has_spoils_its_token_and_no_other(top_k, wrong, rng):
    layer = random_layer(rng, config(top_k=top_k))
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    ids = np.broadcast_to(np.arange(top_k), (3, top_k)).copy()
    expected = call(layer, x, forced_ids=jnp.asarray(ids, jnp.int32))
    ids[1, : 1 if wrong == "one id" else top_k] = 8
    result = call(layer, x, forced_ids=jnp.asarray(ids, jnp.int32))
    assert np.isnan(result[1]).all()
    np.testing.assert_allclose(result[::2], expected[::2], rtol=1e-5, atol=1e-6)


def test_a_custom_function_that_names_no_expert_spoils_the_token(rng):
    def beyond(hidden_states, router_logits, top_k, renormalize):
        shape = (hidden_states.shape[0], top_k)
        return jnp.ones(shape), jnp.full(shape, 9, jnp.int32)

    layer = random_layer(rng, config(router=RouterConfig(custom=beyond)))
    assert np.isnan(call(layer, jnp.ones((2, 6)))).all()


class EvenWeights(nnx.Module):
    """A router of another kind: the best logits, all of them alike, in whatever dtypes it is told."""

    def __init__(self, top_k, weights_dtype=jnp.float32, ids_dtype=jnp.int32):
        self.top_k, self.weights_dtype, self.ids_dtype = top_k, weights_dtype, ids_dtype

    def __call__(self, hidden_states, *, router_logits=None, **unused):
        _, ids = jax.lax.top_k(router_logits, self.top_k)
        return jnp.full(ids.shape, 0.5, self.weights_dtype), ids.astype(self.ids_dtype), router_logits


def test_a_factor_that_a_router_of_another_kind_would_lose_is_refused(rng):
    with pytest.raises(ValueError, match=r"routed_scaling_factor=2.5 would be lost: a EvenWeights scales its own"):
        nnx.eval_shape(lambda: MoERunner(config(router=SCALING), router=EvenWeights(2), rngs=nnx.Rngs(0)))
    plain = random_layer(rng, config())
    scaled = MoERunner(config(router=SCALED_LATER), rngs=nnx.Rngs(0), routed_experts=plain.routed_experts)
    plain.router = scaled.router = EvenWeights(2)
    x, logits = (jnp.asarray(rng.normal(size=(5, size)), jnp.float32) for size in (6, 8))
    expected = 2.5 * call(plain, x, router_logits=logits)
    np.testing.assert_allclose(call(scaled, x, router_logits=logits), expected, rtol=1e-5)


def test_what_a_router_of_another_kind_returns_is_checked_and_reported_in_the_promised_dtypes(rng):
    layer = random_layer(rng, config())
    layer.router = EvenWeights(2, jnp.bfloat16, jnp.int8)
    logits = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    _, aux = nnx.jit(lambda layer, x: layer(x, router_logits=logits.astype(jnp.bfloat16), with_aux=True))(
        layer, jnp.ones((5, 6))
    )
    assert (aux.topk_ids.dtype, aux.topk_weights.dtype, aux.router_logits.dtype) == (jnp.int32, *[jnp.float32] * 2)
    layer.router = EvenWeights(3)
    with pytest.raises(ValueError, match=r"weights of the router EvenWeights must have shape \[5, 2\], got \[5, 3\]"):
        call(layer, jnp.ones((5, 6)), router_logits=logits)


@pytest.mark.parametrize(
    "given",
    [
        dict(strategy="padded_all_to_all"),
        dict(capacity_factor=2.0),
        dict(buffer_factor=2.0),
        dict(one_row_per_rank=True),
        dict(micro_batches=2),
    ],
)
def test_ways_of_dispatch_need_a_mesh(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"needs mesh=, got None with {name}="):
        nnx.eval_shape(lambda: MoERunner(config(parallel=ParallelConfig(**given)), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("activation", ["silu", "silu_no_mul"])
def test_matrices_of_every_kind_start_with_the_variance_of_their_inputs(activation):
    sizes = dict(hidden_size=96, intermediate_size=64, num_experts=12, activation=activation)
    experts = RoutedExperts(config(**sizes), rngs=nnx.Rngs(jax.random.key(0)))
    assert np.std(experts.gate_up_proj[...]) * 96**0.5 == pytest.approx(1, abs=0.02)
    assert np.std(experts.down_proj[...]) * 64**0.5 == pytest.approx(1, abs=0.02)


def abstract_call(layer, shape, dtype=jnp.float32, **arrays):
    """Shapes and dtypes of a call's result; `arrays` are shapes of further float32 arguments."""
    given = {name: jax.ShapeDtypeStruct(of, jnp.float32) for name, of in arrays.items()}
    return nnx.eval_shape(lambda layer, x, given: layer(x, **given), layer, jax.ShapeDtypeStruct(shape, dtype), given)


def abstract_layer(changes, **parts):
    return nnx.eval_shape(lambda: MoERunner(config(**changes), rngs=nnx.Rngs(0), **parts))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("part", ["routed_input_transform", "routed_output_transform", "shared_experts"])
def test_parts_of_ones_own_with_float32_results_do_not_widen_the_layer(part, dtype):
    router = RouterConfig(num_zero_experts=2)
    seen = []

    def widen(x):
        seen.append(x.dtype)
        return x.astype(jnp.float32)

    by_config = abstract_layer(dict(router=router, dtype=dtype), **{part: widen})
    assert abstract_call(by_config, (4, 6)).dtype == dtype
    by_input = abstract_layer(dict(router=router), **{part: widen})
    assert abstract_call(by_input, (4, 6), dtype).dtype == dtype
    assert set(seen) == {jnp.dtype(dtype)}


def test_an_input_of_shared_experts_comes_to_them_in_the_dtype_of_the_layer():
    seen = []

    def record(x):
        seen.append(x.dtype)
        return x

    layer = abstract_layer(dict(dtype=jnp.bfloat16), shared_experts=record)
    assert abstract_call(layer, (4, 6), shared_experts_input=(4, 6)).dtype == jnp.bfloat16
    assert seen == [jnp.bfloat16]


def test_experts_after_a_float32_transform_compute_in_the_dtype_of_the_layer():
    layer = abstract_layer(dict(), routed_input_transform=lambda x: x.astype(jnp.float32))
    dtypes = []

    class Recording(nnx.Module):
        def __call__(self, x, topk_weights, topk_ids):
            dtypes.append(x.dtype)
            return x

    layer.routed_experts = Recording()
    abstract_call(layer, (4, 6), jnp.bfloat16)
    assert dtypes == [jnp.bfloat16]


@pytest.mark.parametrize("of_config", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("of_input", [jnp.bfloat16, jnp.float32])
def test_shared_experts_alone_compute_in_the_dtype_of_the_config_or_else_of_their_input(of_config, of_input):
    settings = config(dtype=of_config, shared_experts=SharedExpertsConfig(intermediate_size=4, sigmoid_gate=True))
    shared = nnx.eval_shape(lambda: SharedExperts(settings, rngs=nnx.Rngs(0)))
    output = nnx.eval_shape(lambda shared, x: shared(x), shared, jax.ShapeDtypeStruct((3, 6), of_input))
    assert output.dtype == (of_config or of_input)


SHARED_OF_WIDTH_9 = SharedExpertsConfig(intermediate_size=4, hidden_size=9)


@pytest.mark.parametrize(
    ("changes", "parts", "shape", "message"),
    [
        (dict(), dict(), (4, 7), r"need tokens \[4, hidden_size=6\], got hidden_states of shape \[4, 7\]"),
        (
            dict(),
            dict(routed_input_transform=lambda x: x[:, :5]),
            (4, 6),
            r"need tokens \[4, hidden_size=6\], got the output of routed_input_transform of shape \[4, 5\]",
        ),
        (
            dict(),
            dict(routed_input_transform=lambda x: x[:1]),
            (4, 6),
            r"got the output of routed_input_transform of shape \[1, 6\]",
        ),
        (dict(shared_experts=SHARED_OF_WIDTH_9), dict(), (4, 6), r"shared experts need tokens \[..., 9\], got shape"),
        (
            dict(shared_experts=SHARED_OF_WIDTH_9),
            dict(routed_input_transform=lambda x: x[:, :6]),
            (4, 9),
            r"must have the same shape to be added, got \[4, 6\] and \[4, 9\]",
        ),
        # Broadcasting would add these without a word.
        (dict(), dict(shared_experts=lambda x: x[:, :1]), (4, 6), r"to be added, got \[4, 6\] and \[4, 1\]"),
        (dict(), dict(shared_experts=lambda x: x[0]), (4, 6), r"to be added, got \[4, 6\] and \[6\]"),
        (dict(), dict(routed_output_transform=lambda x: x[:, :1], shared_experts=abs), (4, 6), r"got \[4, 1\] and"),
        (
            dict(router=RouterConfig(num_zero_experts=2)),
            dict(routed_output_transform=lambda x: x[:, :1]),
            (4, 6),
            r"zero experts return the routed input, so its width must be that of the layer's output \(1\), got 6",
        ),
        (dict(), dict(), (), r"hidden_states must have shape \[..., H\], got \[\]"),
    ],
)
def test_tokens_that_do_not_fit_a_part_are_refused_with_their_shape(changes, parts, shape, message):
    layer = abstract_layer(changes, **parts)
    with pytest.raises(ValueError, match=message):
        abstract_call(layer, shape)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.float8_e4m3fn], ids=lambda dtype: dtype.__name__)
def test_tokens_that_are_no_numbers_to_compute_with_are_refused(dtype):
    with pytest.raises(ValueError, match=f"hidden_states must be floating, of 16 bits or more, got {dtype.__name__}"):
        abstract_call(abstract_layer(dict()), (4, 6), dtype)


class OwnExperts(nnx.Module):
    def __call__(self, x, topk_weights, topk_ids):
        return x


def test_experts_of_ones_own_are_called_but_neither_split_nor_joined_by_shared_ones():
    assert abstract_call(abstract_layer(dict(), routed_experts=OwnExperts()), (4, 6)).shape == (4, 6)
    fused = dict(fuse_shared_experts=True, shared_experts=SharedExpertsConfig(intermediate_size=8))
    with pytest.raises(ValueError, match="fuse_shared_experts=True needs a RoutedExperts as routed_experts, got OwnEx"):
        abstract_layer(fused, routed_experts=OwnExperts())
    split = dict(parallel=ParallelConfig(expert_axis="expert"))
    with pytest.raises(ValueError, match="a layer on a mesh needs a RoutedExperts as routed_experts, got OwnExperts"):
        abstract_layer(split, routed_experts=OwnExperts(), mesh=jax.make_mesh((2,), ("expert",)))
