"""Float64 numpy oracle of expert computation, written from the definitions (spec sections 8 and 10.2): slow and obvious."""

import math

import numpy as np


def sigmoid(value):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-value))


def _silu(gate):
    return gate * sigmoid(gate)


def _gelu(gate):
    return 0.5 * gate * (1 + np.vectorize(math.erf, otypes=[np.float64])(gate / math.sqrt(2)))


def _gelu_tanh(gate):
    return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


def _relu2(gate):
    return np.maximum(gate, 0) ** 2


def activate(name, gate, up=None, *, limit=None, alpha=None, beta=None):
    """The activation `name` with explicit parameters."""
    gate = np.asarray(gate, np.float64)
    up = None if up is None else np.asarray(up, np.float64)
    plain = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu2": _relu2}
    if name.endswith("_no_mul"):
        return plain[name.removesuffix("_no_mul")](gate)
    if name == "silu" and limit is not None:
        return _silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)
    if name in plain:
        return plain[name](gate) * up
    if name in ("swigluoai", "swigluoai_uninterleave"):
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate * sigmoid(alpha * gate) * (up + beta)
    if name == "swiglustep":
        return np.minimum(_silu(gate), limit) * np.clip(up, -limit, limit)
    raise ValueError(name)


def grouped_matmul(rows, weights, group_sizes, *, bias=None, group_offset=0):
    """Row by row."""
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    result = np.zeros((rows.shape[0], weights.shape[1]))
    group_of_row = np.repeat(np.arange(len(group_sizes)), group_sizes) - group_offset
    for row, group in enumerate(group_of_row):
        if 0 <= group < weights.shape[0]:
            result[row] = weights[group] @ rows[row]
            if bias is not None:
                result[row] += np.asarray(bias, np.float64)[group]
    return result


def fused_moe(
    x,
    topk_weights,
    topk_ids,
    gate_up_proj,
    down_proj,
    *,
    activate,
    gate_up_bias=None,
    down_bias=None,
    expert_offset=0,
    apply_router_weight_on_input=False,
):
    """Pair by pair; `activate` is a function of gate (and up)."""
    x, topk_weights = np.asarray(x, np.float64), np.asarray(topk_weights, np.float64)
    gate_up_proj, down_proj = np.asarray(gate_up_proj, np.float64), np.asarray(down_proj, np.float64)
    result = np.zeros(x.shape)
    for token, choice in np.ndindex(*topk_ids.shape):
        expert = int(topk_ids[token, choice]) - expert_offset
        if not 0 <= expert < gate_up_proj.shape[0]:
            continue
        weight, row = topk_weights[token, choice], x[token]
        if apply_router_weight_on_input:
            row, weight = row * weight, 1.0
        projected = gate_up_proj[expert] @ row
        if gate_up_bias is not None:
            projected = projected + np.asarray(gate_up_bias, np.float64)[expert]
        output = down_proj[expert] @ activate(*projected)
        if down_bias is not None:
            output = output + np.asarray(down_bias, np.float64)[expert]
        result[token] += weight * output
    return result
