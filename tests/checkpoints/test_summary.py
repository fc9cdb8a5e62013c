"""Inspect: what it says about checkpoints whose contents are known."""

import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import convert, inspect


@pytest.fixture
def source(tmp_path, rng):
    return tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng), shards=2)


def test_both_kinds_of_folder_are_described(source, tmp_path):
    convert(source, tmp_path / "output")
    tensors = tiny.read_folder(source)
    parameters = sum(array.size for array in tensors.values())
    experts = sum(array.size for name, array in tensors.items() if ".experts." in name)
    for folder, kind in ((source, "huggingface"), (tmp_path / "output", "converted")):
        summary = inspect(folder)
        assert (summary.kind, summary.family, summary.form) == (kind, "qwen3_moe", "per_expert")
        assert (summary.layers, summary.moe_layers) == (2, 2)
        assert (summary.experts, summary.experts_per_token, summary.expert_intermediate_size) == (5, 2, 6)
        assert (summary.hidden_size, summary.vocab_size, summary.shared_intermediate_size) == (8, 11, 0)
        assert summary.parameters == parameters
        assert summary.active_parameters == parameters - experts + experts * 2 // 5
        assert summary.dtypes == {"float32": parameters}
        assert summary.quantization is None
        assert summary.nbytes >= 4 * parameters
    assert inspect(source).files == 2
