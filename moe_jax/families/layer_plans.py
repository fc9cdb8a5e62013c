"""Which layers of a decoder are of which kind: functions of a whole `config.json`, named by family rows."""

from moe_jax.families.settings import HFConfig, key, resolve

NUM_LAYERS = key("num_hidden_layers")

PerLayer = tuple[bool, ...]
"""One answer per layer."""


def every_layer(config: HFConfig) -> PerLayer:
    """True for every layer."""
    return (True,) * resolve(NUM_LAYERS, config)


def sparse_step(config: HFConfig) -> PerLayer:
    """Qwen's rule for MoE layers: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
    step = resolve(key("decoder_sparse_step", default=1), config)
    dense = resolve(key("mlp_only_layers", default=()), config)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(resolve(NUM_LAYERS, config)))


def after_first_dense(config: HFConfig) -> PerLayer:
    """DeepSeek's rule for MoE layers: all but the first `first_k_dense_replace`."""
    dense = resolve(key("first_k_dense_replace"), config)
    return tuple(i >= dense for i in range(resolve(NUM_LAYERS, config)))


def listed_or_every_other(config: HFConfig) -> PerLayer:
    """gpt-oss' rule for sliding attention: as `layer_types` lists, by default layers 0, 2, 4 and so on."""
    return listed_sliding(config) or tuple(i % 2 == 0 for i in range(resolve(NUM_LAYERS, config)))


def listed_or_every_other_below(config: HFConfig) -> PerLayer:
    """Qwen2-MoE's rule for sliding attention: as `layer_types` lists, else every other layer below `max_window_layers`."""
    if not config.get("use_sliding_window"):
        return (False,) * resolve(NUM_LAYERS, config)
    below = resolve(key("max_window_layers", default=28), config)
    return listed_sliding(config) or tuple(i % 2 == 0 and i < below for i in range(resolve(NUM_LAYERS, config)))


def listed_sliding(config: HFConfig) -> PerLayer | None:
    """Which layers `layer_types` calls sliding; None when the file has no such list.

    Raises:
        ValueError: the list has another length than the decoder, or an unknown kind.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    legal = ("sliding_attention", "full_attention")
    if len(kinds) != resolve(NUM_LAYERS, config) or not set(kinds) <= set(legal):
        raise ValueError(
            f"config.json: layer_types must hold num_hidden_layers={resolve(NUM_LAYERS, config)} of {', '.join(legal)}"
            "; "
            f"got {len(kinds)}: {', '.join(sorted(set(kinds)))}"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)
