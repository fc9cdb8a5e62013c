"""Router logits → weights and ids: the one pure function behind every router."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.config import CustomRoutingFunction, RouterConfig
from moe_jax.kernels.rounding import rounded_to

from .hash_table import look_up_experts
from .scoring import SCORES
from .selection import choose_experts
from .simulation import find_strategy
from .sparsemixer import sparsemixer
from .weights import gather_per_expert, renormalize, spoil_tokens_with_unknown_ids


class RoutingResult(NamedTuple):
    """Which experts each token visits, and how much each counts."""

    topk_weights: Float[Array, "T K"]
    """float32, renormalised and scaled as the configuration says; 0 where the id is -1."""
    topk_ids: Int[Array, "T K"]
    """int32 logical ids; -1: no expert; from `num_experts` upwards: zero experts."""


def route(
    router_logits: Float[Array, "T E"],
    config: RouterConfig,
    num_experts: int,
    top_k: int,
    *,
    correction_bias: Float[Array, "E"] | None = None,
    hash_table: Int[Array, "V K"] | None = None,
    per_expert_scale: Float[Array, "E"] | None = None,
    hidden_states: Float[Array, "T H"] | None = None,
    input_ids: Int[Array, "T"] | None = None,
    forced_ids: Int[Array, "T K"] | None = None,
    key: Key[Array, ""] | None = None,
) -> RoutingResult:
    """Choose `top_k` experts per token and weigh them, all in float32.

    The order is score, choose, gather, renormalise, scale per expert, scale, round. Ids come best first and have no
    gradient; weights do. Any number of tokens is legal, zero included. A NaN among a token's logits makes that token's
    weights NaN or arbitrary, but its ids stay in range and distinct, and other tokens are untouched.

    Args:
      router_logits: one per expert and zero expert; any float dtype.
      config: what kind of router.
      num_experts: logical experts, without zero experts.
      top_k: experts per token.
      correction_bias: needed by `config.correction_bias`; one per expert and zero expert.
      hash_table: needed by `config.hash_vocab_size`.
      per_expert_scale: needed by `config.per_expert_scale`; one per expert and zero expert.
      hidden_states: needed by `config.custom` and `config.round_weights_to_input_dtype`.
      input_ids: token ids, needed by `config.hash_vocab_size`.
      forced_ids: route to these experts, as captured from an earlier call; weights are still computed from the logits.
        Negative ids are no expert; an id beyond the last expert makes all weights of its token NaN, as it does in
        `hash_table`.
      key: needed by `config.simulation`.

    Raises:
      ValueError: something needed is missing, something given has no use, or a shape is wrong.

    Source: vLLM `create_fused_moe_router`; spec section 2.
    """
    config.validate(num_experts, top_k)
    num_candidates = num_experts + config.num_zero_experts
    num_tokens = router_logits.shape[0]
    _require_shape("router_logits", router_logits, (num_tokens, num_candidates))
    _require_use("correction_bias", correction_bias, config.correction_bias, (num_candidates,))
    _require_use("per_expert_scale", per_expert_scale, config.per_expert_scale, (num_candidates,))
    _require_use("hash_table", hash_table, config.hash_vocab_size is not None, (config.hash_vocab_size, top_k))
    if forced_ids is not None:
        _require_integers("forced_ids", forced_ids, (num_tokens, top_k))
        forced_ids = jnp.maximum(forced_ids.astype(jnp.int32), -1)
    logits = router_logits.astype(jnp.float32)

    if config.simulation is not None:
        weights, ids = _simulate(config.simulation, key, num_tokens, num_experts, top_k, forced_ids)
    elif config.custom is not None:
        weights, ids = _call_custom(config.custom, hidden_states, logits, top_k, config.renormalize, forced_ids)
    elif config.sparsemixer_jitter is not None:
        weights, ids = sparsemixer(logits, jitter=config.sparsemixer_jitter, forced_ids=forced_ids)
    else:
        weights, ids = _choose_by_score(logits, config, top_k, correction_bias, hash_table, input_ids, forced_ids)
    if forced_ids is not None or hash_table is not None:
        weights = spoil_tokens_with_unknown_ids(weights, ids, num_candidates)

    if per_expert_scale is not None and config.simulation is None:
        weights = weights * gather_per_expert(jnp.broadcast_to(per_expert_scale.astype(jnp.float32), logits.shape), ids)
    if not config.apply_scale_to_output and config.routed_scaling_factor != 1.0:
        weights = weights * config.routed_scaling_factor
    if config.round_weights_to_input_dtype:
        if hidden_states is None:
            raise ValueError("round_weights_to_input_dtype needs hidden_states [T, H], got None")
        weights = rounded_to(weights, hidden_states.dtype)
    return RoutingResult(weights, ids)


def _choose_by_score(
    logits: Float[Array, "T E"],
    config: RouterConfig,
    top_k: int,
    correction_bias: Float[Array, "E"] | None,
    hash_table: Int[Array, "V K"] | None,
    input_ids: Int[Array, "T"] | None,
    forced_ids: Int[Array, "T K"] | None,
) -> RoutingResult:
    """Score, choose (unless ids are forced or looked up), gather and renormalise."""
    scores = logits if config.score_after_top_k else SCORES[config.scoring](logits)
    if forced_ids is not None:
        ids = forced_ids
    elif hash_table is not None:
        if input_ids is None:
            raise ValueError("hash_vocab_size chooses experts by token id: input_ids [T] must be given, got None")
        _require_integers("input_ids", input_ids, logits.shape[:1])
        ids = look_up_experts(hash_table, input_ids)
    else:
        limit = config.scored_group_limit
        ids = choose_experts(scores, top_k=top_k, correction_bias=correction_bias, group_limit=limit)
    weights = gather_per_expert(scores, ids)
    if config.score_after_top_k:
        weights = _score_chosen(weights, ids, config.scoring)
    if config.renormalize:
        weights = renormalize(weights, epsilon=config.renormalize_epsilon)
    return RoutingResult(weights, ids)


def _score_chosen(chosen_logits: Float[Array, "T K"], ids: Int[Array, "T K"], scoring: str) -> Float[Array, "T K"]:
    """Scores among the chosen experts alone; -1 takes no part in them."""
    is_expert = ids >= 0
    # The smallest float, not -inf: a row without any expert keeps a finite softmax and gradient.
    masked = jnp.where(is_expert, chosen_logits, jnp.finfo(chosen_logits.dtype).min)
    return jnp.where(is_expert, SCORES[scoring](masked), 0.0)


def _simulate(
    name: str,
    key: Key[Array, ""] | None,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    forced_ids: Int[Array, "T K"] | None,
) -> RoutingResult:
    if forced_ids is not None:
        raise ValueError(f"forced_ids have no weights under simulation={name!r}, which ignores the logits")
    if key is None:
        raise ValueError(f"simulation={name!r} draws at random: key must be given, got None")
    weights, ids = find_strategy(name)(key, num_tokens, num_experts, top_k)
    return checked_choice(f"simulation {name!r}", weights, ids, num_tokens, top_k)


def _call_custom(
    function: CustomRoutingFunction,
    hidden_states: Float[Array, "T H"] | None,
    logits: Float[Array, "T E"],
    top_k: int,
    renormalize_weights: bool,
    forced_ids: Int[Array, "T K"] | None,
) -> RoutingResult:
    if forced_ids is not None:
        raise ValueError(
            "forced_ids have no weights under a custom routing function, which returns weights and ids together"
        )
    if hidden_states is None:
        raise ValueError("a custom routing function needs hidden_states [T, H], got None")
    weights, ids = function(hidden_states, logits, top_k, renormalize_weights)
    return checked_choice("the custom routing function", weights, ids, logits.shape[0], top_k)


def checked_choice(source: str, weights: Array, ids: Array, num_tokens: int, top_k: int) -> RoutingResult:
    """What code that isn't ours chose: float32 weights, 0 where there is no expert, and int32 ids, of which -1 is none.

    Args:
        source: whose choice it is, for messages.
        weights: any float dtype, must be `[num_tokens, top_k]`.
        ids: any integer dtype, must be `[num_tokens, top_k]`; negative: no expert.
        num_tokens: how many tokens were to be routed.
        top_k: experts per token.

    Raises:
        ValueError: a shape is wrong, or the ids aren't integers.
    """
    _require_shape(f"weights of {source}", weights, (num_tokens, top_k))
    _require_integers(f"ids of {source}", ids, (num_tokens, top_k))
    return RoutingResult(jnp.where(ids < 0, 0.0, weights.astype(jnp.float32)), jnp.maximum(ids.astype(jnp.int32), -1))


def _require_use(name: str, array: Array | None, is_used: bool, shape: tuple[int | None, ...]) -> None:
    if array is None and is_used:
        raise ValueError(f"the router's configuration needs {name} {list(shape)}, got None")
    if array is not None and not is_used:
        raise ValueError(f"{name} was given, but the router's configuration has no use for it")
    if array is not None:
        _require_shape(name, array, shape)


def _require_shape(name: str, array: Array, shape: tuple[int | None, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")


def _require_integers(name: str, array: Array, shape: tuple[int, ...]) -> None:
    _require_shape(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
