"""The measured load: an immutable state, and pure functions that record into it inside a jitted step."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.load_balancing.config import EplbConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EplbState:
    """Load of the last steps, and how many steps there were."""

    window: Int[Array, "W L P"]
    """Rows of each physical expert, int32, one entry per recorded step: a ring buffer. All under one placement."""
    num_recorded: Int[Array, ""]
    """Steps recorded since the last rearrangement, int32; the next one goes to this modulo W."""
    step: Int[Array, ""]
    """Steps since the last rearrangement, dummy ones included, int32; starts at `EplbConfig.initial_step`."""


def initial_state(config: EplbConfig, num_layers: int, num_physical: int) -> EplbState:
    """Nothing recorded yet."""
    return EplbState(
        window=jnp.zeros((config.window_size, num_layers, num_physical), jnp.int32),
        num_recorded=jnp.zeros((), jnp.int32),
        step=jnp.array(config.initial_step, jnp.int32),
    )


def record_load(
    state: EplbState, physical_load: Int[Array, "L P"] | Int[Array, "P"], *, is_dummy: Bool[Array, ""] | bool = False
) -> EplbState:
    """Record one step; donate the state, and the window is updated in place.

    Args:
        state: what was recorded so far.
        physical_load: `MoEAux.physical_load` of a model, or of one layer alone.
        is_dummy: the step only kept this rank in step with others, or warmed up: it counts as a step, its load doesn't.

    Raises:
        ValueError: loads of another number of layers or slots.

    Source: vLLM `EplbState.step`; spec 5.6.
    """
    window_size, *shape = state.window.shape
    row = physical_load if physical_load.ndim == len(shape) else physical_load[None]
    if row.shape != tuple(shape):
        raise ValueError(f"physical_load must have the shape {tuple(shape)} of a window's entry, got {row.shape}")
    at = state.num_recorded % window_size
    row = jnp.where(is_dummy, state.window[at], row.astype(state.window.dtype))
    return EplbState(
        window=jax.lax.dynamic_update_index_in_dim(state.window, row, at, 0),
        num_recorded=state.num_recorded + jnp.where(is_dummy, 0, 1),
        step=state.step + 1,
    )


def is_rearrangement_due(state: EplbState, config: EplbConfig) -> Bool[Array, ""]:
    """Whether `config.step_interval` steps have passed, and any of them has left a load to go by."""
    return (state.step >= config.step_interval) & (state.num_recorded > 0)


def after_rearrangement(state: EplbState) -> EplbState:
    """An empty window, for the old placement's slots held other experts, and a count of steps from zero."""

    def zeros(array: Array) -> Array:
        # In the same place, or a jitted step would be compiled anew for it.
        return jnp.zeros_like(array, device=array.sharding if array.committed else None)

    return jax.tree.map(zeros, state)


def window_load(state: EplbState) -> Float[Array, "L P"]:
    """The window's sum over steps, float32, because many steps of many tokens exceed an int32."""
    return jnp.sum(state.window, axis=0, dtype=jnp.float32)
