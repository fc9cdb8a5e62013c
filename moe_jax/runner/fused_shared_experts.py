"""Which layers can run their shared experts among the routed ones."""

from typing import Any

from moe_jax.experts import SharedExperts


def check_fused_shared_experts(layer: Any) -> None:
    """Raise ValueError unless the parts of a `MoERunner` are those of its config's fused shared experts."""
    config, shared, routed = layer.config, layer.shared_experts, layer.routed_experts
    if not isinstance(shared, SharedExperts):
        raise ValueError(
            "fuse_shared_experts=True needs a SharedExperts, whose weights can stand behind those of the routed experts, "
            f"got {type(shared).__name__}"
        )
    for name in ("routed_input_transform", "routed_output_transform"):
        if (transform := getattr(layer, name)) is not None:
            raise ValueError(
                f"fuse_shared_experts=True needs {name}=None, for it is for routed experts only, "
                f"got {type(transform).__name__}"
            )
    sizes = tuple(shared.down_proj.kernel.shape)
    wanted = (config.shared_experts.intermediate_size, config.hidden_size)
    found = {
        f"down_proj of the shape {wanted}": (wanted, sizes),
        "no sigmoid gate": (True, shared.gate is None),
        "the activation of the routed experts": (routed.computation.activation, shared.activation),
        "biases as the routed experts have them": (routed.down_bias is None, shared.down_proj.bias is None),
    }
    for what, (expected, actual) in found.items():
        if actual != expected:
            raise ValueError(f"fuse_shared_experts=True needs shared_experts with {what}, got {shared}")
