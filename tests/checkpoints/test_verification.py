"""Verify finds every number that differs, and names its tensor."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from support.golden_cases import golden_cases

from moe_jax.checkpoints import CheckpointError, convert, open_checkpoint, verify


@pytest.fixture
def tensors(rng):
    return tiny.random_tensors(rng)


@pytest.fixture
def source(tmp_path, tensors):
    return tiny.write_folder(tmp_path / "source", tensors)


@pytest.fixture
def output(tmp_path, source):
    convert(source, tmp_path / "output", part_bytes=1500)
    return tmp_path / "output"


def flip_bit(output, parameter, element, shape):
    """Flip the lowest bit of one float32 of a parameter that lies in one uncompressed chunk."""
    parts = json.loads((output / "moe_jax.json").read_text())["parts"]
    (part,) = [name for name, slices in parts.items() if parameter in slices]
    (chunk,) = [file for file in (output / "parts" / part / parameter).iterdir() if file.name != ".zarray"]
    data = bytearray(chunk.read_bytes())
    data[4 * int(np.ravel_multi_index(element, shape))] ^= 1
    chunk.write_bytes(data)


def test_a_whole_conversion_is_found_whole(source, output, tensors):
    report = verify(source, output)
    assert report.ok
    assert report.differences == ()
    assert report.tensors == len(tensors)
    assert report.nbytes == sum(array.nbytes for array in tensors.values())


def test_one_flipped_bit_is_found_and_its_tensor_named(source, output):
    flip_bit(output, "layers.1.attention.q_proj.kernel", (2, 3), (8, 8))
    report = verify(source, output)
    assert not report.ok
    (difference,) = report.differences
    assert difference.tensor == "model.layers.1.self_attn.q_proj.weight"
    assert difference.parameter == "layers.1.attention.q_proj.kernel"
    assert difference.values == 1
    assert 0 < difference.largest < 1e-5


def test_a_difference_in_one_expert_names_that_experts_tensor(source, output, tensors):
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name] + 1
    tiny.write_folder(source, tensors)
    (difference,) = verify(source, output).differences
    assert difference.tensor == name
    assert difference.values == tensors[name].size
    assert difference.largest == pytest.approx(1, rel=1e-5)


def test_differences_of_a_tensor_that_is_compared_in_slices_count_together(tmp_path, rng, tensors, source, monkeypatch):
    monkeypatch.setattr("moe_jax.checkpoints.verification._SLICE_BYTES", 50)  # one row
    name = "model.embed_tokens.weight"
    rows, first, last = rng.permutation(11)[:3], rng.uniform(1, 2), rng.uniform(3, 4)
    changed = {**tensors, name: tensors[name].astype(np.float64)}
    changed[name][rows[0], 2] += first
    changed[name][rows[1], 5] -= last
    changed[name] = changed[name].astype(np.float32)
    (difference,) = verify(source, tiny.write_folder(tmp_path / "changed", changed)).differences
    assert (difference.tensor, difference.values) == (name, 2)
    assert difference.largest == pytest.approx(last)
    changed[name][rows[2], 0] = np.nan
    (difference,) = verify(source, tiny.write_folder(tmp_path / "worse", changed)).differences
    assert difference.values == 3
    assert np.isnan(difference.largest)


def test_not_a_number_is_equal_to_itself_and_different_from_everything_else(tmp_path, tensors):
    tensors["model.norm.weight"][3] = np.nan
    source = tiny.write_folder(tmp_path / "with nan", tensors)
    convert(source, tmp_path / "copy")
    assert verify(source, tmp_path / "copy").ok
    tensors["model.norm.weight"][3] = 1
    tiny.write_folder(source, tensors)
    (difference,) = verify(source, tmp_path / "copy").differences
    assert (difference.tensor, difference.values) == ("model.norm.weight", 1)
    assert np.isnan(difference.largest)


def test_the_sign_of_zero_counts(tmp_path, tensors):
    tensors["model.norm.weight"][0] = 0.0
    source = tiny.write_folder(tmp_path / "plus", tensors)
    convert(source, tmp_path / "copy")
    tensors["model.norm.weight"][0] = -0.0
    tiny.write_folder(source, tensors)
    assert not verify(source, tmp_path / "copy").ok


def test_a_missing_part_is_reported_by_name(source, output):
    import shutil

    shutil.rmtree(output / "parts" / "model.000")
    with pytest.raises(CheckpointError, match=r"model\.000: missing"):
        verify(source, output)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_experts": 6}, "num_experts: 5 against 6"), ({"num_hidden_layers": 3}, "layers: 2 against 3")],
    ids=str,
)
def test_models_of_different_shape_or_depth_differ_and_no_value_is_compared(tmp_path, source, rng, change, words):
    config = {**tiny.QWEN3, **change}
    other = tiny.write_folder(tmp_path / "other", tiny.random_tensors(rng, config), config)
    report = verify(source, other)
    assert not report.ok
    assert any(words in setting for setting in report.settings)
    assert (report.tensors, report.differences) == (0, ())


def test_models_of_different_families_differ_by_their_name(source):
    report = verify(source, golden_cases("mixtral")[0].folder("per_expert"))
    assert not report.ok
    assert report.settings == ("model_type: 'qwen3_moe' against 'mixtral'",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 1e6}, "layers 0, 1: attention.rope.theta: 1000.0 against 1000000.0"),
        ({"num_experts_per_tok": 3}, "layers 0, 1: feed_forward.top_k: 2 against 3"),
        ({"norm_topk_prob": False}, "layers 0, 1: feed_forward.router.renormalize: True against False"),
        ({"rms_norm_eps": 1e-5}, "norm_epsilon: 1e-06 against 1e-05"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "max_position_embeddings": 32},  # 64, scaled
            "attention.rope.scaling: None against LinearScaling",
        ),
        ({"max_position_embeddings": 32}, "max_positions: 64 against 32"),
    ],
    ids=str,
)
def test_a_setting_that_changes_what_is_computed_is_a_difference_though_every_value_is_the_same(
    source, output, tensors, change, words
):
    (output / "config.json").write_text(json.dumps({**tiny.QWEN3, **change}))
    report = verify(source, output)
    assert not report.ok
    assert [setting for setting in report.settings if words in setting] == list(report.settings) != []
    assert (report.tensors, report.differences) == (len(tensors), ())


def test_settings_that_change_nothing_may_differ(source, output):
    changed = {
        **tiny.QWEN3,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "rope_theta": None,
        "initializer_range": 0.5,
    }
    changed["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000}
    (output / "config.json").write_text(json.dumps(changed))
    assert verify(source, output).ok


def _first_slice(manifest):
    return manifest["parts"]["model.000"]


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../parts/model.000", "..", "model.000/..", "", "a\\b"])
def test_a_part_outside_the_folder_is_refused(source, output, name):
    manifest = json.loads((output / "moe_jax.json").read_text())
    manifest["parts"] = {name if part == "model.000" else part: slices for part, slices in manifest["parts"].items()}
    (output / "moe_jax.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"moe_jax\.json(.|\n)*must be the name of a part") as caught:
        verify(source, output)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(format_version=99), "format_version must be 1, got 99"),
        (lambda manifest: manifest.pop("leaves"), "leaves"),
        (lambda manifest: manifest["leaves"].pop("final_norm.scale"), "final_norm.scale"),
        (lambda manifest: manifest["leaves"]["final_norm.scale"].update(shape=[9]), r"final_norm.scale: shape"),
        (lambda manifest: manifest["parts"].pop("model.000"), "do not hold all of it"),
        (lambda manifest: manifest.update(family="mixtral"), "family is 'mixtral', but config.json says 'qwen3_moe'"),
        (lambda manifest: manifest.update(family=None), "family must be a name, got None"),
        (
            lambda manifest: manifest["source"].update(form="stacked"),
            "form must be one of per_expert, fused; got 'stacked'",
        ),
        (lambda manifest: manifest["source"].update(dropped=[]), r"dropped must be an object, got \[\]"),
        (lambda manifest: manifest["source"].update(digest=3), "digest must be a text or null, got 3"),
        (lambda manifest: manifest.update(shards=0), "shards must be positive, got 0"),
        (lambda manifest: manifest["leaves"]["final_norm.scale"].update(axis=7), "axis must be one of its 1.*got 7"),
        (lambda manifest: manifest["leaves"]["final_norm.scale"].update(axis=1), "axis must be one of its 1.*got 1"),
        (lambda manifest: manifest["leaves"]["final_norm.scale"].update(axis=-1), "axis must be one of its 1.*got -1"),
        (
            lambda manifest: manifest["leaves"]["final_norm.scale"].update(axis="x"),
            "axis must be one of its 1.*got 'x'",
        ),
        (
            lambda manifest: manifest["leaves"]["final_norm.scale"].update(shape=["8"]),
            r"final_norm.scale: shape must be",
        ),
        (
            lambda manifest: manifest["leaves"]["final_norm.scale"].update(dtype="int8"),
            "dtype must be one of.*got int8",
        ),
        (lambda manifest: _first_slice(manifest).update({"final_norm.scale": [5, 2]}), r"got \[5, 2\]"),
        (lambda manifest: _first_slice(manifest).update({"final_norm.scale": [1, 8]}), "do not hold all of it"),
        (lambda manifest: _first_slice(manifest).update({"final_norm.scale": [0.0, 8]}), r"got \[0.0, 8\]"),
        (
            lambda manifest: _first_slice(manifest).update({"surprise": [0, 8]}),
            "'surprise', which is none of the leaves",
        ),
    ],
    ids=range(21),
)
def test_a_manifest_that_does_not_fit_is_refused(source, output, change, words):
    manifest = json.loads((output / "moe_jax.json").read_text())
    change(manifest)
    (output / "moe_jax.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words):
        verify(source, output)


@pytest.mark.parametrize(
    "description",
    ["[", {"dtype": "<i4"}, {"dtype": "<f2"}, {"shape": [9]}, {"shape": [8, 1], "chunks": [8, 1]}],
    ids=str,
)
def test_an_array_that_is_not_the_one_of_the_manifest_is_not_read(output, description):
    (file,) = output.glob("parts/*/final_norm.scale/.zarray")
    text = description
    if isinstance(description, dict):
        text = json.dumps({**json.loads(file.read_text()), **description})
    file.write_text(text)
    with pytest.raises(CheckpointError, match=r"final_norm\.scale: (cannot be read|holds .* expected float32 \[8\])"):
        open_checkpoint(output).read("final_norm.scale")


def test_numbers_that_became_infinite_are_differences_though_the_copy_has_the_infinity_they_are_rounded_to(
    tmp_path, tensors, rng
):
    """As in a float16 copy of bfloat16 numbers that another program has made."""
    name = "model.layers.1.self_attn.v_proj.weight"
    index = tuple(rng.integers(0, tensors[name].shape))
    tensors[name][index] = 2.0**20
    config = {**tiny.QWEN3, "torch_dtype": None}
    source = tiny.write_folder(tmp_path / "wide", {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()}, config)
    with np.errstate(over="ignore"):
        narrow = {n: a.astype(ml_dtypes.bfloat16).astype(np.float16) for n, a in tensors.items()}
    (difference,) = verify(source, tiny.write_folder(tmp_path / "narrow", narrow, config)).differences
    assert (difference.tensor, difference.values, difference.largest) == (name, 1, np.inf)


def test_decoded_numbers_are_compared_in_the_dtype_of_the_copy(tmp_path, tensors, rng):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = rng.uniform(0.5, 2, (2, 2)).astype(np.float32)  # products that bfloat16 rounds
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    config = {**tiny.QWEN3, "torch_dtype": "bfloat16", "quantization_config": settings}
    source = tiny.write_folder(tmp_path / "quantized", tensors, config)
    convert(source, tmp_path / "decoded", dtype="float32")
    assert verify(source, tmp_path / "decoded").ok
