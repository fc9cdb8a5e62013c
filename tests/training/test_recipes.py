"""The functions that the page about training shows compute what it says they do."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.documentation import ROOT, fences
from support.small_models import small_decoder

from moe_jax import MoEConfig, MoERunner
from moe_jax.models import CausalLM


def shown(name):
    """The function `name` of the page."""
    parser, names = doctest.DocTestParser(), {"jax": jax, "jnp": jnp}
    blocks = fences(ROOT / "docs" / "training.md", "pycon")
    examples = [example for block in blocks for example in parser.get_examples(block)]
    (source,) = (example.source for example in examples if example.source.startswith(f"def {name}("))
    exec(source, names)
    return names[name]


def routed(rng, *, tokens=24, experts=6, top_k=2):
    logits = rng.normal(size=(tokens, experts))
    ids = np.argsort(-logits, axis=-1)[:, :top_k]
    return logits, np.bincount(ids.ravel(), minlength=experts)


def softmax(logits):
    weights = np.exp(logits)
    return weights / weights.sum(axis=-1, keepdims=True)


def test_balancing_loss_is_the_sum_over_experts_of_share_times_probability(rng):
    logits, load = routed(rng)
    expected = 6 * sum(load[e] / 48 * softmax(logits)[:, e].mean() for e in range(6))
    loss = shown("balancing_loss")(jnp.asarray(load), jnp.asarray(logits, jnp.float32).reshape(4, 6, 6))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_balancing_loss_is_hugging_faces_over_the_number_of_choices(rng):
    logits, load = routed(rng)
    per_token = load / len(logits)  # the share that a coefficient of Hugging Face is meant for
    hugging_face = 6 * (per_token * softmax(logits).mean(axis=0)).sum()
    loss = shown("balancing_loss")(jnp.asarray(load), jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(2 * loss, hugging_face, rtol=1e-5)


def test_balancing_loss_of_padding_alone_is_zero_with_a_gradient_of_zero(rng):
    loss, gradient = jax.value_and_grad(shown("balancing_loss"), argnums=1)(
        jnp.zeros(6, jnp.int32), jnp.asarray(rng.normal(size=(4, 6)))
    )
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_balancing_loss_never_mixes_the_logits_of_zero_experts_with_those_of_others(rng):
    with pytest.raises((TypeError, ValueError), match="shape|broadcast"):  # twice as many logits as loads
        shown("balancing_loss")(jnp.ones(6, jnp.int32), jnp.asarray(rng.normal(size=(4, 12))))


def test_biases_of_layers_that_take_turns_move_against_their_own_load(rng):
    decoder = small_decoder(num_hidden_layers=6, num_experts=6)
    layers = []
    for index, layer in enumerate(decoder.layers):
        config = layer.feed_forward
        router = dataclasses.replace(config.router, correction_bias=True)
        width = config.intermediate_size * (1 + index % 2)  # two kinds, one after the other
        config = dataclasses.replace(config, router=router, intermediate_size=width)
        layers.append(dataclasses.replace(layer, feed_forward=config))
    model = CausalLM(dataclasses.replace(decoder, layers=tuple(layers)), rngs=nnx.Rngs(0), implementation="reference")
    (stack,) = model.stacks
    assert stack.moe_positions == (0, 1)

    # Each of the six layers prefers two experts of its own so much that every token goes to them.
    favourites = [(first, (first + step) % 6) for step in (1, 2) for first in (0, 2, 4)]
    for position in stack.moe_positions:
        bias = np.zeros((3, 6), np.float32)
        for repeat in range(3):
            bias[repeat, list(favourites[2 * repeat + position])] = 10
        stack.blocks[position].feed_forward.router.correction_bias[...] = jnp.asarray(bias)
    _, aux = nnx.jit(lambda model, ids: model(ids, with_aux=True))(model, jnp.arange(8).reshape(2, 4))
    before = [np.asarray(block.feed_forward.router.correction_bias[...]) for block in stack.blocks]
    shown("move_biases")(model, aux.expert_load, speed=1.0)

    for block, old in zip(stack.blocks, before, strict=True):
        moved = np.asarray(block.feed_forward.router.correction_bias[...]) - old
        np.testing.assert_array_equal(moved, np.where(old > 0, -1, 1))


def test_loads_come_out_of_a_recomputed_layer_once(rng):
    config = MoEConfig(hidden_size=4, intermediate_size=4, num_experts=6, top_k=2, implementation="reference")
    layer, x = MoERunner(config, rngs=nnx.Rngs(0)), jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def loss(layer, x):
        y, aux = nnx.remat(lambda layer, x: layer(x, with_aux=True))(layer, x)
        return (y**2).sum(), aux.expert_load

    _, load = nnx.jit(nnx.grad(loss, has_aux=True))(layer, x)
    assert load.sum() == 10


@pytest.mark.slow
def test_derivatives_of_every_kind_exist_for_the_reference(rng):
    config = MoEConfig(hidden_size=4, intermediate_size=4, num_experts=6, top_k=2, implementation="reference")
    layer = MoERunner(config, rngs=nnx.Rngs(0))
    x, direction = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)

    def slope(x):
        return jax.jvp(lambda x: (layer(x) ** 2).sum(), (x,), (direction,))[1]

    def slope_backwards(x):
        return (jax.grad(lambda x: (layer(x) ** 2).sum())(x) * direction).sum()

    np.testing.assert_allclose(slope(x), slope_backwards(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.grad(slope)(x), jax.grad(slope_backwards)(x), rtol=1e-3, atol=1e-3)
