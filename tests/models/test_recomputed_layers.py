"""`recompute_layers`: the same gradients from less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import golden_cases
from support.golden_models import QUICK_TO_COMPILE, TOLERANCE, relative_error
from support.small_models import alternating_decoder, small_decoder

from moe_jax import from_pretrained, save_pretrained
from moe_jax.generation import GenerationSettings, generate
from moe_jax.models import CausalLM
from moe_jax.parallel import create_mesh, parallel_of

LATENT = golden_cases.golden_case("deepseek_v3", "negative_bias")  # latent attention, shared experts
IDS = np.random.default_rng(0).integers(0, 16, size=(4, 6))


def model_of(decoder, sizes=None, **options):
    mesh = None if sizes is None else create_mesh(sizes)
    parallel = None if mesh is None else parallel_of(mesh)
    return CausalLM(decoder, rngs=nnx.Rngs(0), mesh=mesh, parallel=parallel, **options)


def loss_of(model, ids):
    """`f(state)`: a loss to which all tokens and router logits contribute, and the expert load."""
    graph = nnx.graphdef(model)
    mask = jnp.ones(ids.shape, jnp.int32).at[0, -2:].set(0)

    def loss(state):
        logits, aux = nnx.merge(graph, state)(jnp.asarray(ids), attention_mask=mask, with_aux=True)
        log_probabilities = jax.nn.log_softmax(logits) * mask[..., None]
        return -log_probabilities[..., 3].mean() + 0.1 * (aux.router_logits**2).mean(), aux.expert_load

    return loss


def gradients_of(model, ids):
    """Loss, expert load, and gradients of all parameters."""
    # Tables of the expert placement hold integers, of which there are no gradients.
    graph, parameters, tables = nnx.split(model, nnx.Param, ...)

    def loss(parameters):
        return loss_of(model, ids)(nnx.state(nnx.merge(graph, parameters, tables)))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK_TO_COMPILE)
    (value, load), gradients = run(parameters)
    return value, load, nnx.to_flat_state(gradients)


def assert_gradients_unchanged(model, ids):
    """Also by setting `recompute_layers` on a model that is already there."""
    model.recompute_layers = False
    value, load, gradients = gradients_of(model, ids)
    model.recompute_layers = True
    value_again, load_again, gradients_again = gradients_of(model, ids)
    np.testing.assert_array_equal(load_again, load)
    np.testing.assert_allclose(value_again, value, rtol=1e-6)
    for (path, expected), (_, actual) in zip(gradients, gradients_again, strict=True):
        largest = np.abs(expected[...]).max()
        np.testing.assert_allclose(actual[...], expected[...], rtol=1e-5, atol=1e-6 * largest, err_msg=str(path))
    assert any(np.any(gradient[...]) for path, gradient in gradients if "router" in path)
    return load_again


@pytest.mark.parametrize(
    ("decoder", "sizes"),
    [
        pytest.param(small_decoder(num_hidden_layers=1), None, marks=pytest.mark.slow),
        (small_decoder(num_hidden_layers=3), None),
        (alternating_decoder(4), None),
        pytest.param(small_decoder(num_hidden_layers=3), {"expert": 4}, marks=pytest.mark.slow),
        pytest.param(alternating_decoder(4), {"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["one layer", "equal layers", "two kinds", "expert parallel", "on three axes"],
)
def test_gradients_are_those_of_layers_that_keep_everything_and_loads_are_counted_once(decoder, sizes):
    load = assert_gradients_unchanged(model_of(decoder, sizes), IDS)
    np.testing.assert_array_equal(load.sum(axis=1), (IDS.size - 2) * 2)  # two of the tokens are padding, top_k is 2


@pytest.mark.slow
def test_gradients_of_latent_attention_and_shared_experts_are_unchanged():
    model = from_pretrained(LATENT.folder("fused"), dtype=np.float32)
    assert_gradients_unchanged(model, LATENT.expected().input_ids[:2, :8])


def kept_beside_parameters(decoder, **options):
    """Bytes of what the forward pass keeps for the gradient of the logits."""
    model = nnx.eval_shape(lambda: model_of(decoder, **options))
    graph, state = nnx.split(model)

    def backward(state):
        return jax.vjp(lambda state: nnx.merge(graph, state)(jnp.asarray(IDS)), state)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept) - sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


@pytest.mark.parametrize(
    "decoder", [lambda n: small_decoder(num_hidden_layers=n), alternating_decoder], ids=["one kind", "two"]
)
def test_of_each_layer_only_its_input_is_kept(decoder):
    def kept_by_a_layer(**options):
        return (kept_beside_parameters(decoder(8), **options) - kept_beside_parameters(decoder(4), **options)) / 4

    input_bytes = IDS.size * 8 * 4  # hidden size, float32
    assert input_bytes <= kept_by_a_layer(recompute_layers=True) <= input_bytes + 4  # and the layer's number
    assert kept_by_a_layer() > 10 * input_bytes


def test_the_compiler_may_not_merge_both_computations_of_a_layer_that_is_in_no_loop():
    """Loops keep them apart: the forward pass has one, the backward pass another. It unrolls a loop of one round."""

    def barriers(num_layers):
        model = nnx.eval_shape(lambda: model_of(small_decoder(num_hidden_layers=num_layers), recompute_layers=True))
        gradient = jax.jit(jax.grad(loss_of(model, IDS), has_aux=True))
        return gradient.lower(nnx.state(model)).as_text().count("optimization_barrier")

    assert barriers(1) > 0
    assert barriers(2) == 0


def test_it_is_an_option_of_loading_that_changes_neither_tokens_nor_what_is_saved(tmp_path):
    expected = LATENT.expected()
    model = from_pretrained(LATENT.folder("fused"), dtype=np.float32, recompute_layers=True)
    assert model.recompute_layers
    assert not from_pretrained(LATENT.folder("fused")).recompute_layers
    forward = jax.jit(lambda state, ids: nnx.merge(nnx.graphdef(model), state)(ids), compiler_options=QUICK_TO_COMPILE)
    logits = forward(nnx.state(model), jnp.asarray(expected.input_ids))
    assert relative_error(logits, expected.logits) < TOLERANCE
    result = generate(model, expected.prompts()[:1], GenerationSettings(max_new_tokens=4))
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens[:1, :4])

    save_pretrained(model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert not again.recompute_layers
    for (path, saved), (_, value) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (again, model)), strict=True):
        np.testing.assert_array_equal(saved[...], value[...], err_msg=str(path))
