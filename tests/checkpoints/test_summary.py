"""Inspect: what it says about checkpoints whose contents are known."""

import json

import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import CheckpointError, convert, inspect


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


def damage_chunk(array):
    """Cut a byte off a chunk; the file."""
    chunk = max(file for file in array.iterdir() if file.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    return chunk


def lengthen_chunk(array):
    chunk = max(file for file in array.iterdir() if file.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes() + b"\0")
    return chunk


def remove_chunk(array):
    chunk = max(file for file in array.iterdir() if file.name != ".zarray")
    chunk.unlink()
    return chunk


def remove_description(array):
    (array / ".zarray").unlink()
    return array / ".zarray"


def describe_otherwise(**changes):
    """Change the description, such as to chunks that are compressed or whose numbers stand in another order."""

    def damage(array):
        description = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps({**description, **changes}))
        return array / ".zarray"

    return damage


def break_description(array):
    (array / ".zarray").write_text("[")
    return array / ".zarray"


DAMAGES = (
    damage_chunk,
    lengthen_chunk,
    remove_chunk,
    remove_description,
    break_description,
    describe_otherwise(shape=[3]),
    describe_otherwise(dtype="<i2"),
    describe_otherwise(chunks=None),
    describe_otherwise(compressor={"id": "zlib"}),
    describe_otherwise(filters=[{"id": "delta"}]),
    describe_otherwise(order="F"),
    describe_otherwise(dimension_separator="/"),
)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_folder_that_misses_a_file_or_a_byte_is_not_whole(source, tmp_path, rng, shards, dtype):
    output = tmp_path / "output"
    convert(source, output, shards=shards, dtype=dtype, part_bytes=1500)
    assert inspect(output).kind == "converted"
    arrays = sorted(file.parent for file in output.rglob(".zarray"))
    for damage, array in zip(DAMAGES, rng.choice(len(arrays), len(DAMAGES), replace=False), strict=True):
        file = damage(arrays[array])
        with pytest.raises(CheckpointError, match="not a whole converted checkpoint") as caught:
            inspect(output)
        assert any(str(file) in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == len(DAMAGES)
