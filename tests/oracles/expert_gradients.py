"""Float64 numpy oracle of the gradients of expert computation: the chain rule, pair by pair, slow and obvious."""

import numpy as np

STEP = 1e-6
"""Of the central differences by which activations, functions of one or two numbers, are differentiated."""


def grouped_matmul(rows, weights, group_sizes, cotangent, *, group_offset=0):
    """Gradients of sum(result * cotangent) with respect to rows, weights and bias."""
    rows, weights, cotangent = (np.asarray(array, np.float64) for array in (rows, weights, cotangent))
    gradients = np.zeros(rows.shape), np.zeros(weights.shape), np.zeros(weights.shape[:2])
    group_of_row = np.repeat(np.arange(len(group_sizes)), group_sizes) - group_offset
    for row, group in enumerate(group_of_row):
        if 0 <= group < weights.shape[0]:
            gradients[0][row] = cotangent[row] @ weights[group]
            gradients[1][group] += np.outer(cotangent[row], rows[row])
            gradients[2][group] += cotangent[row]
    return gradients


def _slopes(activate, projected):
    """The derivative of the activation with respect to each of its arguments."""
    slopes = []
    for index in range(len(projected)):
        above, below = ([*projected] for _ in range(2))
        above[index], below[index] = projected[index] + STEP, projected[index] - STEP
        slopes.append((activate(*above) - activate(*below)) / (2 * STEP))
    return np.stack(slopes)


def fused_moe(
    x,
    topk_weights,
    topk_ids,
    gate_up_proj,
    down_proj,
    *,
    activate,
    cotangent,
    gate_up_bias=None,
    down_bias=None,
    expert_offset=0,
    apply_router_weight_on_input=False,
):
    """Gradients of sum(result * cotangent) with respect to every floating argument that is given, by name."""
    floating = {
        "x": x,
        "topk_weights": topk_weights,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    values = {name: np.asarray(array, np.float64) for name, array in floating.items() if array is not None}
    gradients = {name: np.zeros(array.shape) for name, array in values.items()}
    cotangent = np.asarray(cotangent, np.float64)
    for token, choice in np.ndindex(*topk_ids.shape):
        expert = int(topk_ids[token, choice]) - expert_offset
        if not 0 <= expert < values["gate_up_proj"].shape[0]:
            continue
        weight, row = values["topk_weights"][token, choice], values["x"][token]
        input_weight, output_weight = (weight, 1.0) if apply_router_weight_on_input else (1.0, weight)
        projected = values["gate_up_proj"][expert] @ (row * input_weight)
        if gate_up_bias is not None:
            projected = projected + values["gate_up_bias"][expert]
        activated = activate(*projected)
        result = values["down_proj"][expert] @ activated
        if down_bias is not None:
            result = result + values["down_bias"][expert]

        result_gradient = cotangent[token] * output_weight
        gradients["down_proj"][expert] += np.outer(result_gradient, activated)
        activated_gradient = result_gradient @ values["down_proj"][expert]
        projected_gradient = activated_gradient * _slopes(activate, projected)
        gradients["gate_up_proj"][expert] += projected_gradient[:, :, None] * (row * input_weight)
        row_gradient = np.einsum("pi,pih->h", projected_gradient, values["gate_up_proj"][expert])
        gradients["x"][token] += row_gradient * input_weight
        gradients["topk_weights"][token, choice] = (
            row_gradient @ row if apply_router_weight_on_input else cotangent[token] @ result
        )
        if gate_up_bias is not None:
            gradients["gate_up_bias"][expert] += projected_gradient
        if down_bias is not None:
            gradients["down_bias"][expert] += result_gradient
    return gradients
