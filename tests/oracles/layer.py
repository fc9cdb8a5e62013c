"""Float64 numpy oracle of a whole MoE layer, written from spec sections 1.4, 2.4 to 2.8 and 10.2: slow and obvious."""

import functools

import numpy as np
from oracles import experts


def softmax_router(logits, *, top_k, num_experts, renormalize=True, factor=1.0):
    """Weights and ids, best first, ties to the lowest id."""
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    return _choose(scores, scores, top_k, renormalize, factor)


def grouped_sigmoid_router(logits, *, top_k, num_experts, num_groups, groups_kept, correction_bias, factor=1.0):
    """DeepSeek-V3: groups scored by the sum of their two best biased scores, weights unbiased and renormalised."""
    scores = experts.sigmoid(logits)
    biased = scores + np.asarray(correction_bias, np.float64)
    choice = np.full_like(biased, -np.inf)
    group_size = num_experts // num_groups
    for token in range(len(logits)):
        groups = biased[token].reshape(num_groups, group_size)
        best = np.argsort(-np.sort(groups, axis=-1)[:, -2:].sum(axis=-1), kind="stable")[:groups_kept]
        for group in best:
            members = slice(group * group_size, (group + 1) * group_size)
            choice[token, members] = biased[token, members]
    return _choose(scores, choice, top_k, True, factor)


def _choose(scores, choice, top_k, renormalize, factor):
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights * factor, ids


def linear(x, parameters):
    """Of an `nnx.Linear` given as a dictionary."""
    result = x @ np.asarray(parameters["kernel"], np.float64)
    return result + np.asarray(parameters["bias"], np.float64) if "bias" in parameters else result


def shared_experts(x, parameters, *, activate):
    """The dense MLP and its sigmoid gate."""
    halves = [linear(x, parameters[name]) for name in ("gate_proj", "up_proj") if name in parameters]
    result = linear(activate(*halves), parameters["down_proj"])
    return result * experts.sigmoid(linear(x, parameters["gate"])) if "gate" in parameters else result


def layer(
    hidden_states,
    parameters,
    *,
    route,
    num_experts,
    activation="silu",
    input_transform=None,
    output_transform=None,
    output_factor=1.0,
    shared_factor=1.0,
    router_logits=None,
    shared_input=None,
    apply_router_weight_on_input=False,
):
    """The layer's output, and the ids chosen.

    Args:
        hidden_states: `[T, D]`.
        parameters: nested dictionary of the layer's parameters.
        route: function of logits, `num_experts` -> weights, ids.
        output_factor, shared_factor: what the scaling plan multiplies the routed and the shared output by.
    """
    tokens = np.asarray(hidden_states, np.float64)
    activate = functools.partial(experts.activate, activation)
    routed_input = tokens if input_transform is None else input_transform(tokens)
    if router_logits is None:
        router_logits = routed_input @ np.asarray(parameters["router"]["weight"], np.float64).T
    weights, ids = route(np.asarray(router_logits, np.float64), num_experts=num_experts)
    is_zero_expert = ids >= num_experts

    routed = parameters["routed_experts"]
    output = experts.fused_moe(
        routed_input,
        weights,
        np.where(is_zero_expert, -1, ids),
        routed["gate_up_proj"],
        routed["down_proj"],
        activate=activate,
        gate_up_bias=routed.get("gate_up_bias"),
        down_bias=routed.get("down_bias"),
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
    output = output * output_factor
    if output_transform is not None:
        output = output_transform(output)
    if "shared_experts" in parameters:
        shared_input = tokens if shared_input is None else np.asarray(shared_input, np.float64)
        output = output + shared_factor * shared_experts(shared_input, parameters["shared_experts"], activate=activate)
    if is_zero_expert.any():
        output = output + (weights * is_zero_expert).sum(axis=-1, keepdims=True) * routed_input
    return output, ids
