"""Activations: published numbers, an independent oracle, and the rules about their parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import experts as oracle

from moe_jax.kernels import ACTIVATIONS, Activation

GATE = jnp.array([-2, -0.5, 0.5, 2, 9, -9], jnp.float32)
UP = jnp.array([1, -3, 8, -8, 0.25, 2], jnp.float32)

SILU_LIMITED_TO_7 = [-0.238406, 0.566311, 2.178608, -12.331159, 1.748406, -0.002221]
GOLDEN = [
    (Activation("silu"), [-0.238406, 0.566311, 2.489837, -14.092753, 2.249722, -0.002221]),
    (Activation("silu", limit=7), SILU_LIMITED_TO_7),
    (Activation("swiglustep"), [-0.238406, 0.566311, 2.178608, -12.331159, 1.750000, -0.002221]),
    (Activation("gelu"), [-0.045500, 0.462806, 2.765850, -15.635998, 2.25, 0]),
    (Activation("gelu_tanh"), [-0.045402, 0.462858, 2.765712, -15.636782, 2.25, 0]),
    (Activation("swigluoai"), [-0.128683, 0.299223, 2.803107, -11.613952, 8.749941, -0.000006]),
    (Activation("swigluoai_uninterleave", limit=7), SILU_LIMITED_TO_7),
    (Activation("relu2_no_mul"), [0, 0, 0.25, 4, 81, 0]),
]

PARAMETERS = [
    Activation("silu"),
    Activation("silu", limit=1.5),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("swigluoai"),
    Activation("swigluoai", limit=2.0, alpha=0.7, beta=0.25),
    Activation("swigluoai_uninterleave", limit=2.0, alpha=1.702, beta=1.0),
    Activation("swiglustep"),
    Activation("swiglustep", limit=1.5),
    Activation("silu_no_mul"),
    Activation("gelu_no_mul"),
    Activation("gelu_tanh_no_mul"),
    Activation("relu2_no_mul"),
]


def apply(activation, gate, up):
    return activation(gate, up) if activation.is_gated else activation(gate)


@pytest.mark.parametrize(("activation", "expected"), GOLDEN, ids=str)
def test_published_values_are_reproduced_to_the_digits_printed(activation, expected):
    np.testing.assert_allclose(apply(activation, GATE, UP), expected, rtol=0, atol=1.5e-6)


@pytest.mark.parametrize("activation", PARAMETERS, ids=str)
def test_every_activation_agrees_with_its_formula(activation, rng):
    gate, up = (jnp.array(rng.normal(size=200) * 4, jnp.float32) for _ in range(2))
    expected = oracle.activate(
        activation.name,
        gate,
        up if activation.is_gated else None,
        limit=activation.limit,
        alpha=activation.alpha,
        beta=activation.beta,
    )
    # 1 + tanh of a very negative gate cancels in float32: what is lost is in proportion to the inputs, not to the result.
    inputs = np.abs(gate) * (np.abs(up) if activation.is_gated else 1)
    error = np.abs(np.asarray(apply(activation, gate, up)) - expected)
    assert np.all(error <= 2e-5 * np.abs(expected) + 4 * np.finfo(np.float32).eps * inputs + 2e-6)


def test_no_activation_is_left_out_of_these_tests():
    assert {activation.name for activation in PARAMETERS} == set(ACTIVATIONS)


def exactly(activation, gate, up):
    """What the oracle says of these numbers, in float64."""
    parameters = {name: getattr(activation, name) for name in ("limit", "alpha", "beta")}
    return oracle.activate(
        activation.name, np.float64(gate), np.float64(up) if activation.is_gated else None, **parameters
    )


@pytest.mark.parametrize("activation", [*PARAMETERS, Activation("swiglustep", limit=0.7)], ids=str)
def test_computes_in_float32_and_returns_the_input_dtype(activation, rng):
    gate, up = (jnp.array(rng.normal(size=300), jnp.bfloat16) for _ in range(2))
    result = apply(activation, gate, up)
    assert result.dtype == jnp.bfloat16
    # One rounding to the 8 significant bits of bfloat16: at most half a unit in the last place.
    np.testing.assert_allclose(np.float64(result), exactly(activation, gate, up), rtol=1.01 * 2**-8, atol=1e-6)


@pytest.mark.parametrize("activation", PARAMETERS, ids=str)
def test_computes_in_float64_where_the_input_is(activation, rng):
    with jax.enable_x64(True):
        gate, up = (jnp.array(rng.normal(size=300)) for _ in range(2))
        result = apply(activation, gate, up)
    assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, exactly(activation, gate, up), rtol=1e-12, atol=1e-13)


def test_alias_is_the_name_it_stands_for():
    assert Activation("gelu_pytorch_tanh") == Activation("gelu_tanh")


def test_defaults_are_filled_in_so_that_equal_activations_are_equal_and_hash_alike():
    explicit = Activation("swigluoai", limit=7.0, alpha=1.702, beta=1.0)
    assert Activation("swigluoai") == explicit
    assert len({Activation("swigluoai"), explicit, Activation("swigluoai", limit=6.0)}) == 2


def test_of_accepts_a_name_or_an_activation():
    limited = Activation("silu", limit=10.0)
    assert Activation.of(limited) is limited
    assert Activation.of("relu2") == Activation("relu2")


def test_unknown_name_is_refused_with_the_legal_ones():
    with pytest.raises(ValueError, match="unknown activation 'swish'") as error:
        Activation.of("swish")
    assert all(name in str(error.value) for name in (*ACTIVATIONS, "gelu_pytorch_tanh"))


@pytest.mark.parametrize("value", [None, 3, ["silu"]])
def test_what_is_no_name_is_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"unknown activation {value!r}; legal are silu")):
        Activation.of(value)


def test_situ_is_refused_because_its_formula_is_unpublished():
    with pytest.raises(ValueError, match="'situ' is not supported, its formula is unpublished"):
        Activation("situ")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("swigluoai_uninterleave", {}, "needs limit"),
        ("gelu", {"limit": 7.0}, "takes no parameters, got limit=7.0"),
        ("silu", {"alpha": 1.0}, "takes limit, got alpha=1.0"),
        ("silu_no_mul", {"limit": 7.0}, "takes no parameters"),
        ("silu", {"limit": 0.0}, "must be positive"),
        ("swiglustep", {"limit": float("inf")}, "must be positive and finite"),
        ("swigluoai", {"alpha": float("nan")}, "alpha of activation 'swigluoai' must be finite, got nan"),
        ("swigluoai_uninterleave", {"limit": 7.0, "beta": float("inf")}, "beta .* must be finite, got inf"),
    ],
)
def test_illegal_parameters_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        Activation(name, **parameters)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_without_mul_is_the_activation_of_gate_alone(name):
    alone = Activation(name).without_mul()
    assert not alone.is_gated
    assert alone.without_mul() == alone
    np.testing.assert_allclose(alone(GATE) * UP, Activation(name)(GATE, UP), rtol=1e-6)


@pytest.mark.parametrize(
    "activation", [Activation("swigluoai"), Activation("swiglustep"), Activation("silu", limit=7.0)]
)
def test_without_mul_is_refused_where_there_is_no_such_form(activation):
    with pytest.raises(ValueError, match="no form without multiplication"):
        activation.without_mul()


def test_wrong_number_of_inputs_is_refused():
    with pytest.raises(ValueError, match="function of gate and up"):
        Activation("silu")(GATE)
    with pytest.raises(ValueError, match="function of gate alone"):
        Activation("silu_no_mul")(GATE, UP)


@pytest.mark.parametrize("activation", PARAMETERS, ids=str)
def test_gradients_agree_with_finite_differences(activation, rng):
    # Away from the kinks of clamps and relu, where a derivative does not exist.
    points = rng.uniform(0.2, 1.2, size=(2, 50)) * rng.choice([-1, 1], size=(2, 50))
    gate, up = (jnp.array(row, jnp.float32) for row in points)

    gradient = jax.grad(lambda gate, up: jnp.sum(apply(activation, gate, up)), argnums=(0, 1))(gate, up)
    step = 1e-5
    expected = [
        (
            exactly(activation, gate64 + step * d, up64 + step * e)
            - exactly(activation, gate64 - step * d, up64 - step * e)
        )
        / (2 * step)
        for gate64, up64 in [(np.float64(gate), np.float64(up))]
        for d, e in [(1, 0), (0, 1)]
    ]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
