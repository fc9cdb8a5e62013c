"""What several devices can share of each parameter, for all parameters that any family has."""

import dataclasses
import functools
import re

import pytest
from support.published_configs import CONFIGS

from moe_jax.config import MoEConfig
from moe_jax.families import FAMILIES, get_family, parameter_shapes
from moe_jax.families.decoder import DenseFeedForward
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


def with_twice_as_many(units, decoder):
    """The same decoder, but for the number of these units."""

    def changed(layer):
        attention, feed_forward = layer.attention, layer.feed_forward
        match units:
            case "query heads":
                attention = dataclasses.replace(attention, num_heads=2 * attention.num_heads)
            case "key/value heads":
                attention = dataclasses.replace(attention, num_kv_heads=2 * attention.num_kv_heads)
            case "experts" if isinstance(feed_forward, MoEConfig):
                feed_forward = dataclasses.replace(feed_forward, num_experts=2 * feed_forward.num_experts)
            case "intermediate features" if isinstance(feed_forward, DenseFeedForward):
                feed_forward = dataclasses.replace(feed_forward, intermediate_size=2 * feed_forward.intermediate_size)
            case "intermediate features" if (shared := feed_forward.shared_experts) is not None:
                shared = dataclasses.replace(shared, intermediate_size=2 * shared.intermediate_size)
                feed_forward = dataclasses.replace(feed_forward, shared_experts=shared)
        return dataclasses.replace(layer, attention=attention, feed_forward=feed_forward)

    if units == "vocabulary entries":
        return dataclasses.replace(decoder, vocab_size=2 * decoder.vocab_size)
    return dataclasses.replace(decoder, layers=tuple(map(changed, decoder.layers)))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_is_split_along_the_axis_of_its_units_unless_every_device_needs_it(model_type):
    """With twice as many units that axis, and no other, is twice as long."""
    config = {**CONFIGS[model_type], **ALL_BIASES.get(model_type, {})}
    decoder = get_family(config).build_decoder(config)
    twice = functools.cache(lambda units: parameter_shapes(with_twice_as_many(units, decoder)))
    for path, shape in parameter_shapes(decoder).items():
        split = split_of(path)
        assert (split is None) == bool(WHOLE.fullmatch(path)), path
        if split is not None:
            expected = [size * 2 if axis == split.dimension else size for axis, size in enumerate(shape)]
            assert list(twice(split.units)[path]) == expected, path
