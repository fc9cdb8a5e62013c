"""The measured load: what a window holds, and when a rearrangement is due (spec 5.6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.load_balancing import EplbConfig, initial_state, is_rearrangement_due, record_load
from moe_jax.load_balancing.state import after_rearrangement, window_load


def test_defaults_are_upstreams():
    config = EplbConfig()
    assert (config.window_size, config.step_interval, config.initial_step) == (1000, 3000, 2250)


@pytest.mark.parametrize("interval", [1, 3, 8])
def test_first_rearrangement_is_due_after_a_quarter_of_the_interval(interval):
    config = EplbConfig(window_size=2, step_interval=interval)
    state = initial_state(config, 1, 2)
    steps = 0
    while not is_rearrangement_due(state, config):
        state, steps = record_load(state, jnp.ones((1, 2), jnp.int32)), steps + 1
    assert steps == max(1, interval // 4)  # one at least, or there is nothing to go by
    state = after_rearrangement(state)
    for step in range(interval):
        assert not is_rearrangement_due(state, config), step
        state = record_load(state, jnp.ones((1, 2), jnp.int32))
    assert is_rearrangement_due(state, config)


def test_steps_without_a_load_are_never_enough_for_a_rearrangement():
    config = EplbConfig(window_size=2, step_interval=2)
    state = initial_state(config, 1, 2)
    for _ in range(5):
        state = record_load(state, jnp.ones((1, 2), jnp.int32), is_dummy=True)
    assert not is_rearrangement_due(state, config)
    assert is_rearrangement_due(record_load(state, jnp.ones((1, 2), jnp.int32)), config)


def test_window_holds_the_last_steps_and_dummy_steps_only_count(rng):
    config = EplbConfig(window_size=3, step_interval=100)
    record = jax.jit(record_load, donate_argnums=0)
    state, remembered = initial_state(config, 2, 4), []
    for step in range(8):
        load, is_dummy = rng.integers(50, size=(2, 4)).astype(np.int32), step in (1, 5)
        state = record(state, load, is_dummy=is_dummy)
        remembered = remembered if is_dummy else [*remembered, load][-3:]
        np.testing.assert_array_equal(window_load(state), np.sum(remembered, axis=0))
    assert (int(state.step), int(state.num_recorded)) == (75 + 8, 6)
    np.testing.assert_array_equal(window_load(after_rearrangement(state)), np.zeros((2, 4)))


def test_the_load_of_a_single_layer_needs_no_axis_of_layers():
    state = record_load(initial_state(EplbConfig(window_size=2), 1, 3), jnp.array([1, 2, 3]))
    np.testing.assert_array_equal(window_load(state), [[1, 2, 3]])


def test_a_sum_beyond_the_integers_of_32_bits_is_right():
    state = initial_state(EplbConfig(window_size=4), 1, 2)
    for _ in range(4):
        state = record_load(state, jnp.array([[2**30, 1]], jnp.int32))
    np.testing.assert_array_equal(window_load(state), [[2**32, 4]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EplbConfig(window_size=0), "window_size must be positive, got 0"),
        (lambda: EplbConfig(step_interval=-1), "step_interval must be positive, got -1"),
        (lambda: EplbConfig(num_nodes=0), "num_nodes must be positive, got 0"),
        (lambda: EplbConfig(window_size=1.5), "window_size must be an integer, got 1.5"),
        (
            lambda: record_load(initial_state(EplbConfig(window_size=1), 2, 3), jnp.ones((2, 4), jnp.int32)),
            r"shape \(2, 3\) of a window's entry, got \(2, 4\)",
        ),
    ],
)
def test_settings_and_loads_that_cannot_be_meant_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
