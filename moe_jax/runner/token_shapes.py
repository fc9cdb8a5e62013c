"""What the parts of a layer hand on to each other: tokens, checked where they meet, so that none is stretched to fit."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def check_hidden_states(hidden_states: Any) -> None:
    """Raise ValueError unless these are tokens, in a dtype that experts can compute in."""
    if hidden_states.ndim < 1:
        raise ValueError(f"hidden_states must have shape [..., H], got {list(hidden_states.shape)}")
    if not jnp.issubdtype(hidden_states.dtype, jnp.floating) or jnp.finfo(hidden_states.dtype).bits < 16:
        raise ValueError(f"hidden_states must be floating, of 16 bits or more, got {hidden_states.dtype}")


def check_routed_input(transform: Any, routed_input: Array, num_tokens: int, hidden_size: int) -> None:
    """Raise ValueError unless the routed experts get `num_tokens` tokens of the width that the config says."""
    if routed_input.shape == (num_tokens, hidden_size):
        return
    source = "hidden_states" if transform is None else "the output of routed_input_transform"
    raise ValueError(
        f"the routed experts need tokens [{num_tokens}, hidden_size={hidden_size}], "
        f"got {source} of shape {list(routed_input.shape)}"
    )


def check_same_tokens(routed: Array, shared: Array) -> None:
    """Raise ValueError unless routed and shared output can be added token by token; broadcasting would hide it."""
    if routed.shape != shared.shape:
        raise ValueError(
            "the routed output, after routed_output_transform, and the shared experts' must have the same shape "
            f"to be added, got {list(routed.shape)} and {list(shared.shape)}"
        )
