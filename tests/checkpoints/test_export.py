"""Export: back to Hugging Face's names, layouts and files, bit by bit."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from support import golden_cases

from moe_jax.checkpoints import CheckpointError, convert, export, open_checkpoint, verify

PLAIN = [(case, form) for case, form in golden_cases.cases_and_forms() if form in ("per_expert", "fused")]
QUANTIZED = [(case, form) for case, form in golden_cases.cases_and_forms() if form not in ("per_expert", "fused")]


@pytest.fixture
def converted(tmp_path):
    return tmp_path / "converted"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def kept_tensors(case, form):
    """The tensors of a golden checkpoint that a reader must keep."""
    tensors = tiny.read_folder(case.folder(form))
    return {name: array for name, array in tensors.items() if name not in case.dropped_tensors}


@pytest.mark.parametrize(("case", "form"), PLAIN, ids=str)
def test_convert_and_export_give_back_the_tensors_bit_by_bit(case, form, converted, output):
    report = convert(case.folder(form), converted)
    assert (report.form, report.quantization) == (form, None)
    assert sorted(report.dropped) == sorted(case.dropped_tensors)
    verification = verify(case.folder(form), converted)
    assert verification.ok
    assert sorted(verification.dropped) == sorted(case.dropped_tensors)
    assert export(converted, output).form == form
    tiny.assert_same_tensors(tiny.read_folder(output), kept_tensors(case, form))
    assert json.loads((output / "config.json").read_text()) == case.config(form)


@pytest.mark.parametrize("case", sorted({case for case, _ in PLAIN}, key=str), ids=str)
def test_either_form_can_be_written_from_the_other(case, output, tmp_path):
    if {"per_expert", "fused"} <= set(case.forms):
        for form, other in (("per_expert", "fused"), ("fused", "per_expert")):
            export(case.folder(form), tmp_path / other, form=other)
            tiny.assert_same_tensors(tiny.read_folder(tmp_path / other), kept_tensors(case, other))


@pytest.mark.parametrize(("case", "form"), QUANTIZED, ids=str)
def test_quantized_checkpoints_come_back_decoded_and_say_so(case, form, converted, output):
    report = convert(case.folder(form), converted)
    assert report.quantization == {"mxfp4": "mxfp4", "block_fp8": "fp8"}[form]
    assert sorted(report.dropped) == sorted(case.dropped_tensors)
    export(converted, output)
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    plain = next(form for form in ("per_expert", "fused") if form in case.forms)
    if open_checkpoint(output).form == plain:
        expected, actual = kept_tensors(case, plain), tiny.read_folder(output)
        assert actual.keys() == expected.keys()
        for name, array in expected.items():  # by value: formats differ in the sign of a zero
            np.testing.assert_array_equal(actual[name].astype(np.float32), array.astype(np.float32), err_msg=name)
    assert verify(case.folder(form), output).ok


@pytest.fixture
def source(tmp_path, rng):
    return tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng))


def test_shards_hold_at_most_what_was_asked_and_the_index_lists_them_all(source, output):
    report = export(source, output, max_shard_bytes=2000)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 3
    assert (
        files
        == sorted(report.files)
        == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    index = json.loads((output / "model.safetensors.index.json").read_text())
    tensors = tiny.read_folder(source)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values()) == report.nbytes
    for file in files:
        inside = [array.nbytes for name, array in tensors.items() if index["weight_map"][name] == file]
        assert sum(inside) <= 2000 or len(inside) == 1
    tiny.assert_same_tensors(tiny.read_folder(output), tensors)


@pytest.mark.parametrize("form", ["per_expert", "fused"])
def test_a_parameter_that_is_larger_than_a_slice_is_written_slice_by_slice(source, output, form, monkeypatch):
    export(source, output.with_name("at once"), form=form)
    monkeypatch.setattr("moe_jax.checkpoints.exporting._SLICE_BYTES", 100)
    export(source, output, form=form)
    assert (output / "model.safetensors").read_bytes() == (
        output.with_name("at once") / "model.safetensors"
    ).read_bytes()
    if form == "per_expert":
        tiny.assert_same_tensors(tiny.read_folder(output), tiny.read_folder(source))


def test_every_tensor_is_aligned_to_its_numbers(output):
    case = golden_cases.golden_cases("deepseek_v3")[0]  # its correction biases stay float32
    export(case.folder("per_expert"), output, dtype="bfloat16")
    content = (output / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {"F32", "BF16"}
    for entry in header.values():
        assert (8 + length + entry["data_offsets"][0]) % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0


def test_files_carry_the_metadata_that_transformers_demands(source, output):
    from safetensors import safe_open

    export(source, output)
    with safe_open(output / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (output / "model.safetensors.index.json").exists()  # one file needs none


SPELLINGS = [
    ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
    ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    ({"dtype": None, "torch_dtype": "float16"}, {"dtype": None, "torch_dtype": "bfloat16"}),
    ({}, {}),
]


@pytest.mark.parametrize(("before", "after"), SPELLINGS, ids=str)
@pytest.mark.parametrize("write", [convert, export])
def test_every_dtype_that_the_configuration_names_is_the_one_that_was_written(
    tmp_path, rng, output, write, before, after
):
    others = {name: value for name, value in tiny.QWEN3.items() if name != "torch_dtype"}
    source = tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng), {**others, **before})
    write(source, output, dtype="bfloat16")
    assert json.loads((output / "config.json").read_text()) == {**others, **after}
    assert open_checkpoint(output).dtype_of("embedder.embedding") == ml_dtypes.bfloat16


def test_a_dtype_is_added_where_another_would_be_assumed(tmp_path, rng, output):
    unnamed = {name: value for name, value in tiny.QWEN3.items() if name != "torch_dtype"}
    source = tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng), unnamed)
    convert(source, output)
    assert json.loads((output / "config.json").read_text()) == {**unnamed, "dtype": "float32"}


def test_tokenizer_chat_template_and_generation_settings_travel_along(source, converted, output):
    names = (
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
        "tokenizer.model", "tiktoken.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    )  # fmt: skip
    for name in names:
        (source / name).write_text(f"of {name}")
    convert(source, converted)
    shutil.rmtree(source)
    export(converted, output)
    for name in names:
        assert (output / name).read_text() == f"of {name}"


def test_an_unknown_form_is_refused_with_the_legal_ones(source, output):
    with pytest.raises(CheckpointError, match="per_expert, fused; got 'stacked'"):
        export(source, output, form="stacked")
    assert not output.exists()


def test_gpt_oss_has_no_per_expert_form(output):
    case = golden_cases.golden_cases("gpt_oss")[0]
    with pytest.raises(CheckpointError, match="gpt_oss checkpoints have no per_expert form"):
        export(case.folder("fused"), output, form="per_expert")
    assert not output.exists()


def test_progress_ends_at_the_total(source, output):
    events = []
    report = export(source, output, progress=events.append)
    assert (events[0].done_bytes, events[-1].done_bytes) == (0, report.nbytes)
