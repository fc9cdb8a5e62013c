"""Expert shapes are those of the published configurations, and `fused_moe` takes them."""

import jax
import jax.numpy as jnp
import pytest
from support import published_configs

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.kernels import fused_moe

PUBLISHED = {
    "mixtral-8x7b": published_configs.MIXTRAL_8X7B,
    "qwen3-30b-a3b": published_configs.QWEN3_30B_A3B,
    "deepseek-v3": published_configs.DEEPSEEK_V3_671B,
    "gpt-oss-20b": published_configs.GPT_OSS_20B,
    "olmoe-1b-7b": published_configs.OLMOE_1B_7B,
}


def first_of(config, *keys):
    return next(config[key] for key in keys if key in config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_published_config(name):
    shape, config = EXPERT_SHAPES[name], PUBLISHED[name]
    assert shape.hidden_size == config["hidden_size"]
    assert shape.intermediate_size == first_of(config, "moe_intermediate_size", "intermediate_size")
    assert shape.num_experts == first_of(config, "n_routed_experts", "num_experts", "num_local_experts")
    assert shape.top_k == config["num_experts_per_tok"]


def test_a_rank_holds_its_share_of_the_experts_of_the_whole_model():
    whole, rank = EXPERT_SHAPES["deepseek-v3"], EXPERT_SHAPES["deepseek-v3-ep32"]
    assert (whole.local_experts, rank.local_experts) == (256, 8)
    assert rank.rows_per_expert(1024) == whole.rows_per_expert(1024) == 32
    with pytest.raises(ValueError, match="ranks must divide num_experts=10, got 4"):
        ExpertShape(name="uneven", hidden_size=8, intermediate_size=8, num_experts=10, top_k=1, ranks=4)


@pytest.mark.parametrize("shape", EXPERT_SHAPES.values(), ids=EXPERT_SHAPES.keys())
def test_fused_moe_takes_the_arguments(shape):
    arguments = shape.fused_moe_arguments(3)
    y = jax.eval_shape(lambda kwargs: fused_moe(**kwargs, activation=shape.activation), arguments)
    assert (y.shape, y.dtype) == ((3, shape.hidden_size), jnp.bfloat16)
    assert shape.has_bias == (arguments["down_bias"] is not None) == shape.name.startswith("gpt-oss")
