"""Which checkpoint tensor belongs to which expert parameter, in the per-expert form (spec 4.1 and 4.2).

A row is `(parameter fragment, checkpoint fragment, physical expert id, shard)` with shard "w1" (gate), "w2" (down) or
"w3" (up). A tensor whose name contains the checkpoint fragment belongs to the parameter whose name has the parameter
fragment in its place; because both fragments end where the suffix begins, one row serves weights, biases and scales
alike.

Source: vLLM `RoutedExperts.make_expert_params_mapping` and `fused_moe_make_expert_params_mapping` (pull request 40671).
"""

from collections.abc import Iterator
from typing import Any

MappingRow = tuple[str, str, int, str]
"""Parameter fragment, checkpoint fragment, physical expert id, shard."""

GATE_UP_FRAGMENT = "routed_experts.gate_up_"
DOWN_FRAGMENT = "routed_experts.down_"

HALF_OF_SHARD = {"w1": 0, "w3": 1}
"""Shards of `gate_up_proj [E, 2, I, H]` -> index on its second axis."""

LEAF_OF_SUFFIX = {"weight": "proj", "bias": "bias"}
"""What follows the checkpoint fragment -> what follows the parameter fragment."""


def fused_moe_make_expert_params_mapping(
    model: Any,
    ckpt_gate_proj_name: str,
    ckpt_down_proj_name: str,
    ckpt_up_proj_name: str,
    num_experts: int,
    num_redundant_experts: int = 0,
    *,
    routed_experts_prefix: str = "",
) -> list[MappingRow]:
    """VLLM's rows, with vLLM's parameter names (`experts.w13_`, `experts.w2_`).

    Args:
        model: A model whose parameters may be LoRA-wrapped (then "base_layer." is inserted on both sides): anything
            with `named_parameters()`, an NNX module, or None.
        ckpt_gate_proj_name: The checkpoint's name of an expert's gate projection, such as "gate_proj" or "w1".
        ckpt_down_proj_name: The checkpoint's name of the down projection.
        ckpt_up_proj_name: The checkpoint's name of the up projection; "" for experts without a gate.
        num_experts: Logical experts.
        num_redundant_experts: Extra physical experts; physical expert `num_experts + i` holds logical expert
            `i % num_experts`.
        routed_experts_prefix: Name of the module that holds the experts' weights inside the layer, such as
            "routed_experts"; "" if they sit in the layer itself.

    Returns:
        `3 * (num_experts + num_redundant_experts)` rows: physical experts ascending, shards in the order w1, w2, w3.

    Raises:
        ValueError: `num_experts` isn't positive or `num_redundant_experts` is negative.
    """
    base_layer = "base_layer." if any(".base_layer." in name for name in _parameter_names(model)) else ""
    module = f"{routed_experts_prefix}." if routed_experts_prefix else ""
    gate_up_names = (ckpt_gate_proj_name, ckpt_up_proj_name)
    return [
        (
            f"experts.{module}{base_layer}{'w13_' if name in gate_up_names else 'w2_'}",
            f"experts.{logical}.{name}.{base_layer}",
            physical,
            shard,
        )
        for physical, logical, shard, name in _shards(
            (ckpt_gate_proj_name, ckpt_down_proj_name, ckpt_up_proj_name), num_experts, num_redundant_experts
        )
    ]


def make_expert_params_mapping(
    ckpt_gate_proj_name: str,
    ckpt_down_proj_name: str,
    ckpt_up_proj_name: str,
    num_experts: int,
    num_redundant_experts: int = 0,
) -> list[MappingRow]:
    """The same rows with our parameter names: `routed_experts.gate_up_` and `routed_experts.down_`.

    The reader of per-expert checkpoints walks these rows. Experts without a gate (`ckpt_up_proj_name=""`) have no w3
    rows here, because there is nothing to read; arguments and errors are otherwise those of
    `fused_moe_make_expert_params_mapping`.
    """
    names = (ckpt_gate_proj_name, ckpt_down_proj_name, ckpt_up_proj_name)
    return [
        (DOWN_FRAGMENT if shard == "w2" else GATE_UP_FRAGMENT, f"experts.{logical}.{name}.", physical, shard)
        for physical, logical, shard, name in _shards(names, num_experts, num_redundant_experts)
        if name
    ]


def _shards(
    names: tuple[str, str, str], num_experts: int, num_redundant_experts: int
) -> Iterator[tuple[int, int, str, str]]:
    """(physical expert, logical expert, shard, checkpoint name) in upstream's order."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be positive, got {num_experts}")
    if num_redundant_experts < 0:
        raise ValueError(f"num_redundant_experts must not be negative, got {num_redundant_experts}")
    for physical in range(num_experts + num_redundant_experts):
        for shard, name in zip(("w1", "w2", "w3"), names, strict=True):
            yield physical, physical % num_experts, shard, name


def _parameter_names(model: Any) -> Iterator[str]:
    if model is None:
        return
    if hasattr(model, "named_parameters"):
        yield from (name for name, _ in model.named_parameters())
        return
    from flax import nnx

    for path, _ in nnx.to_flat_state(nnx.state(model)):
        yield ".".join(map(str, path))
