"""Checkpoints of random numbers, for measuring conversion, are converted like any other."""

import numpy as np
import pytest

from moe_jax.benchmarking.synthetic_checkpoint import DEEPSEEK_V3_LAYER, QWEN3_LIKE, write_synthetic_checkpoint
from moe_jax.checkpoints import convert
from moe_jax.checkpoints.converted import ConvertedCheckpoint

SMALL = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    "config",
    [
        QWEN3_LIKE | SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
        DEEPSEEK_V3_LAYER | SMALL | {"n_routed_experts": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
    ],
    ids=["bfloat16", "block FP8"],
)
def test_a_synthetic_checkpoint_has_shards_of_at_most_the_size_asked_for_and_is_converted(config, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    nbytes = write_synthetic_checkpoint(source, config, shard_bytes=400_000)
    shards = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert len(shards) > 1
    assert nbytes < sum(shards) < nbytes + 100_000  # headers
    convert(source, output)
    converted = ConvertedCheckpoint(output)
    experts = [path for path in converted.shapes if path.endswith("gate_up_proj")]
    assert experts
    for path in experts:
        gate_up = converted.read_slice(path, 0, converted.shapes[path][0], "bfloat16")
        assert np.isfinite(np.asarray(gate_up, np.float32)).all()
