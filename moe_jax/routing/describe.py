"""A router's configuration in words."""

from moe_jax.config import RouterConfig


def describe(config: RouterConfig, num_experts: int, top_k: int) -> str:
    """What a router does, step by step, in one line; for `repr`, logs and error reports.

    Example: `logits → sigmoid → top 8 of 256 (+ correction bias) → divide by sum → × 2.5 (weights)`
    """
    return " → ".join([*_choice(config, num_experts, top_k), *_finish(config)])


def _choice(config: RouterConfig, num_experts: int, top_k: int) -> list[str]:
    if config.simulation is not None:
        return [f"simulated {config.simulation}, {top_k} of {num_experts}"]
    steps = ["RMS norm × H**-0.5 × learned scale"] if config.normalize_input else []
    steps.append("logits + bias" if config.logits_bias else "logits")
    if config.custom is not None:
        return [
            *steps,
            f"custom function {getattr(config.custom, '__name__', repr(config.custom))}, {top_k} of {num_experts}",
        ]
    if config.sparsemixer_jitter is not None:
        return [*steps, f"sparsemixer (jitter {config.sparsemixer_jitter:g}), {top_k} of {num_experts}"]

    steering = " (+ correction bias)" if config.correction_bias else ""
    pool = f"{num_experts} + {config.num_zero_experts} zero experts" if config.num_zero_experts else f"{num_experts}"
    chosen = [
        f"{top_k} of {pool} by token id" if config.hash_vocab_size is not None else f"top {top_k} of {pool}{steering}"
    ]
    limit = config.scored_group_limit
    if limit is not None:
        chosen.insert(0, f"best {limit.groups_kept} of {limit.num_groups} groups by {limit.score}{steering}")
    score = [config.scoring]
    steps += [*chosen, *score] if config.score_after_top_k else [*score, *chosen]
    if config.renormalize:
        epsilon = f" + {config.renormalize_epsilon:g}" if config.renormalize_epsilon else ""
        steps.append(f"divide by sum{epsilon}")
    return steps


def _finish(config: RouterConfig) -> list[str]:
    steps = ["× learned scale of the expert"] if config.per_expert_scale else []
    if config.routed_scaling_factor != 1.0:
        where = "routed output, by the runner" if config.apply_scale_to_output else "weights"
        steps.append(f"× {config.routed_scaling_factor:g} ({where})")
    if config.round_weights_to_input_dtype:
        steps.append("round to the input's dtype")
    return steps
