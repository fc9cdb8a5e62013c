"""What several devices can share of each parameter, for all parameters that any family has."""

import re

import pytest
from support.published_configs import CONFIGS

from moe_jax.families import FAMILIES, get_family, parameter_shapes
from moe_jax.families.parameter_splits import split_of

ALL_BIASES = {
    "deepseek_v2": {"attention_bias": True, "mlp_bias": True, "q_lora_rank": 96},
    "deepseek_v3": {"attention_bias": True},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True},
    "qwen3_moe": {"attention_bias": True},
    "olmoe": {"attention_bias": True},
}
WHOLE = re.compile(
    r".*norm\.scale|.*\.router\.\w+|.*\.(q_a_proj|kv_a_proj)\.\w+|.*\.shared_experts\.gate\.kernel"
    r"|.*\.attention\.o_proj\.bias|.*\.(feed_forward|shared_experts)\.down_proj\.bias"
)
"""Small, or added to what was summed over devices."""


def units_of(decoder, path, units):
    if units == "vocabulary entries":
        return decoder.vocab_size
    layer = decoder.layers[int(path.split(".")[1])]
    return {
        "query heads": lambda: layer.attention.num_heads,
        "key/value heads": lambda: layer.attention.num_kv_heads,
        "experts": lambda: layer.feed_forward.num_experts,
        "intermediate features": lambda: (
            (layer.feed_forward.shared_experts if "shared_experts" in path else layer.feed_forward).intermediate_size
        ),
    }[units]()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_is_split_into_whole_units_unless_every_device_needs_it(model_type):
    config = {**CONFIGS[model_type], **ALL_BIASES.get(model_type, {})}
    decoder = get_family(config).build_decoder(config)
    for path, shape in parameter_shapes(decoder).items():
        split = split_of(path)
        assert (split is None) == bool(WHOLE.fullmatch(path)), path
        if split is not None:
            assert shape[split.dimension] % units_of(decoder, path, split.units) == 0, path
