"""The router as a Flax NNX module: parameters, logits, and `route`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import MoEConfig

from .describe import describe
from .hash_table import default_hash_table
from .logits import compute_router_logits, normalize_router_input
from .route import route
from .simulation import find_strategy


class RoutingBuffer(nnx.Variable):
    """State that steers the choice of experts and has no gradient: correction bias, hash table.

    A type of its own, so that `nnx.grad` and optimizers, which work on `nnx.Param`, leave it alone; a load-balancing
    rule or a checkpoint sets it.
    """


class RouterOutput(NamedTuple):
    """What crosses the router's boundary, and the logits it came from."""

    topk_weights: Float[Array, "T K"]
    """float32, renormalised, and scaled if the scaling plan says that the router scales."""
    topk_ids: Int[Array, "T K"]
    """int32 logical ids; -1: no expert; from `num_experts` upwards: zero experts."""
    router_logits: Float[Array, "T E"]
    """float32; one per expert and zero expert."""


class Router(nnx.Module):
    """Hidden states → `(topk_weights, topk_ids)`, for every kind of router that `RouterConfig` can describe.

    Attributes (those the configuration doesn't ask for are None; C = num_experts + num_zero_experts):
      weight: `[C, H]`, param_dtype.
      bias: `[C]`, param_dtype, if `logits_bias`.
      input_scale: `[H]`, param_dtype, if `normalize_input`.
      per_expert_scale: `[C]`, param_dtype, if `per_expert_scale`.
      correction_bias: `[C]`, always float32, if `correction_bias`.
      hash_table: `[vocab, K]` int32, if `hash_vocab_size`.
    """

    def __init__(self, config: MoEConfig, *, hidden_size: int | None = None, rngs: nnx.Rngs):
        """Create the parameters.

        Args:
          config: the layer's configuration; `config.router` says what kind of router.
          hidden_size: width of the router's input where it is not `config.hidden_size` (a router that sees the tokens
            before `routed_input_transform`).
          rngs: source of the initial weight.

        Raises:
          ValueError: `config.router.simulation` names no registered strategy.
        """
        self.config = config.router
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.hidden_size = config.hidden_size if hidden_size is None else hidden_size
        if self.config.simulation is not None:
            find_strategy(self.config.simulation)

        candidates = self.num_experts + self.config.num_zero_experts
        dtype = config.param_dtype
        initializer = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = nnx.Param(initializer(rngs.params(), (candidates, self.hidden_size), dtype))
        self.bias = nnx.Param(jnp.zeros(candidates, dtype)) if self.config.logits_bias else None
        self.input_scale = nnx.Param(jnp.ones(self.hidden_size, dtype)) if self.config.normalize_input else None
        self.per_expert_scale = nnx.Param(jnp.ones(candidates, dtype)) if self.config.per_expert_scale else None
        self.correction_bias = (
            RoutingBuffer(jnp.zeros(candidates, jnp.float32)) if self.config.correction_bias else None
        )
        self.hash_table = (
            RoutingBuffer(default_hash_table(self.config.hash_vocab_size, self.num_experts, self.top_k))
            if self.config.hash_vocab_size is not None
            else None
        )

    def compute_logits(self, hidden_states: Float[Array, "T H"]) -> Float[Array, "T E"]:
        """Router logits of the hidden states, float32.

        Raises:
          ValueError: the hidden states have another width than the router's weight.
        """
        width = self.weight.shape[-1]
        if hidden_states.ndim != 2 or hidden_states.shape[1] != width:
            raise ValueError(f"the router needs hidden_states [T, {width}], got shape {list(hidden_states.shape)}")
        if self.input_scale is not None:
            hidden_states = normalize_router_input(
                hidden_states, self.input_scale[...], epsilon=self.config.input_norm_epsilon
            )
        return compute_router_logits(hidden_states, self.weight[...], None if self.bias is None else self.bias[...])

    def __call__(
        self,
        hidden_states: Float[Array, "T H"],
        *,
        router_logits: Float[Array, "T E"] | None = None,
        input_ids: Int[Array, "T"] | None = None,
        forced_ids: Int[Array, "T K"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> RouterOutput:
        """Route tokens.

        Args:
          hidden_states: the tokens.
          router_logits: use these instead of computing them from `hidden_states`.
          input_ids: token ids, for hash routing.
          forced_ids: go to these experts (routing replay); their weights still come from the logits. -1: no expert.
          key: randomness, for simulated routing.

        Raises:
          ValueError: an argument that this router needs is missing, or a shape is wrong; see `route`.
        """
        if router_logits is None:
            router_logits = self.compute_logits(hidden_states)
        router_logits = router_logits.astype(jnp.float32)
        weights, ids = route(
            router_logits,
            self.config,
            self.num_experts,
            self.top_k,
            correction_bias=_value(self.correction_bias),
            hash_table=_value(self.hash_table),
            per_expert_scale=_value(self.per_expert_scale),
            hidden_states=hidden_states,
            input_ids=input_ids,
            forced_ids=forced_ids,
            key=key,
        )
        return RouterOutput(weights, ids, router_logits)

    def describe(self) -> str:
        """What this router does, step by step, in one line."""
        return describe(self.config, self.num_experts, self.top_k)


def _value(variable: nnx.Variable | None) -> Array | None:
    return None if variable is None else variable[...]
