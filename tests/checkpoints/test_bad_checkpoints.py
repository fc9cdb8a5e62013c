"""Bad input: each ends in a message that names file and tensor, before a byte is written."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from support import golden_cases

from moe_jax.checkpoints import CheckpointError, convert, inspect, open_checkpoint, verify, write_converted

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def tensors(rng):
    return tiny.random_tensors(rng)


def refuses(source, *words):
    """Opening and converting both fail, saying `words`, and nothing is written."""
    output = source.with_name("output")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    with pytest.raises(CheckpointError):
        convert(source, output)
    tiny.assert_nothing_that_looks_whole(output)
    assert not output.with_name("output.incomplete").exists()
    return caught.value


def test_an_absent_folder_is_refused(source):
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(source, source.with_name("output"))


def test_a_folder_without_a_configuration_is_refused(source):
    source.mkdir()
    refuses(source, "config.json")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("\xff", "is not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
        (f'{{"hidden_size": {"9" * 5000}}}', "is not valid JSON"),
    ],
    ids=["open brace", "list", "not UTF-8", "nested too deeply", "too many digits"],
)
def test_a_broken_configuration_is_refused(source, tensors, text, problem):
    tiny.write_folder(source, tensors)
    (source / "config.json").write_text(text, encoding="latin-1")
    refuses(source, f"{source / 'config.json'}: {problem}")


def test_an_unknown_family_is_refused_with_the_known_ones(source, tensors):
    tiny.write_folder(source, tensors, {**tiny.QWEN3, "model_type": "llama"})
    refuses(source, str(source / "config.json"), "'llama'", "qwen3_moe", "mixtral")


def test_a_configuration_key_that_changes_the_result_and_is_unknown_is_refused(source, tensors):
    tiny.write_folder(source, tensors, {**tiny.QWEN3, "embedding_multiplier": 12.0})
    refuses(source, "embedding_multiplier=12.0")


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", "1e-6"), ("rope_parameters", "x")])
def test_a_configuration_value_of_a_wrong_type_is_refused_with_file_and_key(source, tensors, key, value):
    tiny.write_folder(source, tensors, {**tiny.QWEN3, key: value})
    refuses(source, str(source / "config.json"), f"{key} must be", repr(value))


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("hidden_act", "mish", ": hidden_act 'mish' is not supported"),
        ("rms_norm_eps", "1e-6", ": rms_norm_eps must be"),
        ("mystery", 1, " has settings that are not supported: mystery=1"),
        ("hidden_size", None, " has no hidden_size"),
        ("model_type", "llama", ": model_type 'llama' is not supported"),
    ],
)
def test_a_problem_of_the_configuration_names_its_file_once(source, tensors, key, value, problem):
    tiny.write_folder(source, tensors, {**tiny.QWEN3, key: value})
    error = refuses(source, f"{source / 'config.json'}{problem}")
    assert str(error).count("config.json") == 1


@pytest.mark.parametrize("changes", [{"head_dim": 2 * 10**400}, {"rope_scaling": {"type": "yarn", "factor": 1e308}}])
def test_numbers_beyond_any_model_are_refused_with_their_file(source, tensors, changes):
    tiny.write_folder(source, tensors, {**tiny.QWEN3, **changes})
    refuses(source, str(source / "config.json"))


def test_a_missing_configuration_key_is_named(source, tensors):
    tiny.write_folder(source, tensors, {key: value for key, value in tiny.QWEN3.items() if key != "hidden_size"})
    refuses(source, str(source / "config.json"), "hidden_size")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_refused_with_the_reason_and_never_opened(source, name, tmp_path):
    tiny.write_folder(source, {})
    (source / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    # Unpickling this would create the file.
    (source / name).write_bytes(f"cposix\nsystem\n(S'touch {touched}'\ntR.".encode())
    refuses(source, name, "pickle", "runs whatever code")
    assert not touched.exists()


def test_a_folder_without_weights_is_refused(source):
    tiny.write_folder(source, {})
    (source / "model.safetensors").unlink()
    refuses(source, "no *.safetensors")


def test_an_absent_shard_is_named(source, tensors):
    tiny.write_folder(source, tensors, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refuses(source, str(source / "model-00002-of-00003.safetensors"), "does not exist")


def test_a_truncated_shard_is_named_with_its_tensor(source, tensors):
    tiny.write_folder(source, tensors, shards=3)
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refuses(source, str(shard), "truncated", "model.")


def test_every_bad_shard_is_reported_at_once(source, tensors):
    tiny.write_folder(source, tensors, shards=3)
    (source / "model-00001-of-00003.safetensors").unlink()
    (source / "model-00003-of-00003.safetensors").write_bytes(b"")
    refuses(source, "model-00001-of-00003", "model-00003-of-00003")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/../../outside.safetensors", "a\\b"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(source, tensors, name):
    tiny.write_folder(source, tensors, shards=2)
    tiny.write_file(source.with_name("outside.safetensors"), tensors)
    tiny.write_index(source, dict.fromkeys(tensors, name))
    refuses(source, str(source / INDEX), repr(name), "outside the folder")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(source, tensors):
    tiny.write_folder(source, tensors, shards=2)
    tiny.write_file(source.with_name("outside.safetensors"), tensors)
    (source / "link.safetensors").symlink_to("../outside.safetensors")
    tiny.write_index(source, dict.fromkeys(tensors, "link.safetensors"))
    outside = source.with_name("outside.safetensors")
    refuses(source, f"{source / 'link.safetensors'}: is a link to {outside}, outside the folder")


@pytest.mark.parametrize("target", ["../outside.safetensors", "../nowhere.safetensors"])
def test_a_single_file_that_is_a_link_out_of_the_folder_is_called_so(source, tensors, target):
    tiny.write_folder(source, tensors)
    (source / "model.safetensors").rename(source.with_name("outside.safetensors"))
    (source / "model.safetensors").symlink_to(target)
    linked = source.parent / target.removeprefix("../")
    refuses(source, f"{source / 'model.safetensors'}: is a link to {linked}, outside the folder")


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path, tensors):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    tiny.write_folder(snapshot, tensors)
    blob = tmp_path / "models--a--b" / "blobs" / "cafe"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    assert open_checkpoint(snapshot).shapes


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_without_a_weight_map_is_refused(source, tensors, weight_map):
    tiny.write_folder(source, tensors)
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refuses(source, str(source / INDEX), "weight_map")


def test_an_index_that_disagrees_with_its_files_is_refused(source, tensors):
    tiny.write_folder(source, tensors, shards=2)
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    first, second, third, *_ = tensors
    weight_map[first] = "model-00002-of-00002.safetensors"  # is in the first file
    del weight_map[second]  # is in a file
    weight_map["phantom"] = "model-00001-of-00002.safetensors"  # is in none
    tiny.write_index(source, weight_map)
    error = refuses(source, first, second, "phantom", "model-00002-of-00002.safetensors")
    assert not any(third in problem for problem in error.problems)


def test_an_index_of_shards_that_are_gone_does_not_hide_the_single_file(source, tensors):
    tiny.write_folder(source, tensors, shards=2)
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    tiny.write_folder(source, tensors)  # as transformers saves it again: one file, and the index stays
    assert (
        open_checkpoint(source).read("embedder.embedding").tobytes() == tensors["model.embed_tokens.weight"].tobytes()
    )


def test_a_single_file_is_read_in_place_of_the_shards_beside_it(source, tensors):
    tiny.write_folder(source, {name: np.zeros_like(values) for name, values in tensors.items()}, shards=2)
    tiny.write_folder(source, tensors)
    assert (
        open_checkpoint(source).read("embedder.embedding").tobytes() == tensors["model.embed_tokens.weight"].tobytes()
    )


def test_an_index_that_names_the_single_file_must_agree_with_it(source, tensors):
    tiny.write_folder(source, tensors)
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    tiny.write_index(source, weight_map)
    assert open_checkpoint(source).shapes
    tiny.write_index(source, {**weight_map, "phantom": "model.safetensors"})
    refuses(source, "phantom", "is missing, but model.safetensors.index.json says it is there")


def test_a_tensor_in_two_files_is_refused(source, tensors):
    tiny.write_folder(source, tensors)
    tiny.write_file(source / "other.safetensors", {"model.norm.weight": tensors["model.norm.weight"]})
    (source / "model.safetensors").rename(source / "another.safetensors")
    refuses(source, "model.norm.weight", "is also in", "other.safetensors")


def test_all_problems_of_a_checkpoint_are_reported_at_once(source, tensors):
    file = str(source / "model.safetensors")
    missing = "model.layers.1.mlp.experts.3.up_proj.weight"
    misshapen = "model.layers.0.self_attn.q_proj.weight"
    mistyped = "model.layers.0.input_layernorm.weight"
    del tensors[missing]
    tensors[misshapen] = tensors[misshapen][:-1]
    tensors[mistyped] = np.arange(8, dtype=np.int64)
    tensors["model.layers.0.mlp.surprise.weight"] = np.zeros(3, np.float32)
    tiny.write_folder(source, tensors)
    error = refuses(
        source,
        f"{missing}: missing",
        f"{file}: {misshapen}: shape must be [8, 8], got [7, 8]",
        f"{file}: {mistyped}: dtype must be one of bfloat16, float16, float32; got int64",
        f"{file}: model.layers.0.mlp.surprise.weight: unexpected",
    )
    assert len(error.problems) == 4


def test_a_layer_that_the_configuration_does_not_count_is_refused(source, tensors):
    """Multi-token prediction or not: the family has none, so it would be a layer of the decoder that is left out."""
    surplus = {"model.layers.2.eh_proj.weight": np.zeros((8, 16), np.float32)}
    tiny.write_folder(source, {**tensors, **surplus}, {**tiny.QWEN3, "num_nextn_predict_layers": 1})
    refuses(source, "model.layers.2.eh_proj.weight: unexpected tensor")
    tiny.write_folder(source, tensors, {**tiny.QWEN3, "num_hidden_layers": 1})
    error = refuses(source, "model.layers.1.mlp.experts.3.up_proj.weight: unexpected tensor")
    assert len(error.problems) == sum(name.startswith("model.layers.1.") for name in tensors)


@pytest.mark.parametrize(
    ("changes", "surplus"),
    [
        ({"num_nextn_predict_layers": 0}, [3]),  # it says that there is none
        ({"num_hidden_layers": 2}, [2, 3]),  # of two, one is a layer of the decoder, the other one too deep
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 2}, [2]),
        ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, [1, 2, 3]),
    ],
    ids=str,
)
def test_no_layer_of_the_decoder_is_taken_for_one_of_multi_token_prediction(source, changes, surplus):
    case = golden_cases.golden_case("glm4_moe", "qk_norm")  # three layers and one for multi-token prediction
    case.write_hub_style_folder("per_expert", source)
    (source / "config.json").write_text(json.dumps({**case.config(), **changes}))
    error = refuses(source, *(f"model.layers.{layer}.input_layernorm.weight: unexpected" for layer in surplus[:1]))
    assert {int(problem.partition("model.layers.")[2].partition(".")[0]) for problem in error.problems} == set(surplus)


def test_a_transposed_expert_is_a_wrong_shape(source, tensors):
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    tiny.write_folder(source, tensors)
    refuses(source, name, "[6, 8]", "[8, 6]")


def test_experts_of_one_parameter_must_agree_in_dtype(source, tensors):
    name = "model.layers.0.mlp.experts.4.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    tiny.write_folder(source, tensors)
    refuses(source, "layers.0.feed_forward.routed_experts.gate_up_proj", name, "float16")


def test_a_missing_output_table_is_refused_unless_the_embedding_is_tied(source, tensors):
    del tensors["lm_head.weight"]
    tiny.write_folder(source, tensors)
    refuses(source, "lm_head.weight: missing")
    tiny.write_folder(source, tensors, {**tiny.QWEN3, "tie_word_embeddings": True})
    assert "lm_head.kernel" not in open_checkpoint(source).shapes


def tied(tensors):
    """A configuration whose tables are tied, and tensors that hold both."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    return tensors, {**tiny.QWEN3, "tie_word_embeddings": True}


def test_an_output_table_that_differs_from_the_embedding_it_is_tied_to_is_refused(source, tensors, rng):
    tensors, config = tied(tensors)
    table = tensors["lm_head.weight"]
    table.view(np.uint8).reshape(-1)[rng.integers(table.nbytes)] ^= 1
    tiny.write_folder(source, tensors, config)
    words = ("lm_head.weight differs from model.embed_tokens.weight", str(source / "config.json"), "should be false")
    refuses(source, str(source / "model.safetensors"), *words)
    with pytest.raises(CheckpointError, match="differs from"):
        verify(source, source)
    tiny.write_folder(source, tensors, {**config, "tie_word_embeddings": False})
    np.testing.assert_array_equal(open_checkpoint(source).read("lm_head.kernel"), table.T)


def test_an_output_table_of_another_dtype_or_shape_than_the_embedding_it_is_tied_to_is_refused(source, tensors):
    tensors, config = tied(tensors)
    for other in (tensors["lm_head.weight"].astype(np.float16), tensors["lm_head.weight"][:-1]):
        tiny.write_folder(source, {**tensors, "lm_head.weight": other}, config)
        refuses(source, "lm_head.weight differs from model.embed_tokens.weight")


def test_an_output_table_that_equals_the_embedding_it_is_tied_to_is_compared_in_pieces(source, tensors, monkeypatch):
    tensors, config = tied(tensors)
    tiny.write_folder(source, tensors, config, shards=2)
    monkeypatch.setattr("moe_jax.checkpoints.safetensors_file._COMPARED_BYTES", 100)  # three rows of 32 bytes
    read = []
    real = os.preadv
    monkeypatch.setattr("os.preadv", lambda *arguments: read.append(real(*arguments)) or read[-1])
    assert "lm_head.kernel" not in open_checkpoint(source).shapes
    assert sum(read) == 2 * tensors["lm_head.weight"].nbytes
    assert max(read) <= 100
    read.clear()
    assert inspect(source).tied_embeddings
    assert read == []  # only headers


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_other_quantization_methods_are_refused_by_name(source, tensors, method):
    tiny.write_folder(source, tensors, {**tiny.QWEN3, "quantization_config": {"quant_method": method}})
    refuses(source, str(source / "config.json"), repr(method), "fp8, mxfp4")


@pytest.mark.parametrize(
    "settings",
    [{"activation_scheme": "static"}, {"fmt": "e5m2"}, {"weight_block_size": [128]}, {"weight_block_size": [0, 128]}],
    ids=str,
)
def test_variants_of_fp8_that_would_be_read_wrongly_are_refused(source, tensors, settings):
    config = {**tiny.QWEN3, "quantization_config": {"quant_method": "fp8", **settings}}
    tiny.write_folder(source, tensors, config)
    refuses(source, next(iter(settings)), str(next(iter(settings.values()))))


def test_float8_without_a_quantization_config_is_refused(source, tensors, rng):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tiny.write_folder(source, tensors)
    refuses(source, name, "quantization_config")


def test_float8_without_or_with_misshapen_scales_is_refused(source, tensors):
    first, second = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    for name in (first, second):
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{second}_scale_inv"] = np.ones((1, 1), np.float32)
    config = {**tiny.QWEN3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    tiny.write_folder(source, tensors, config)
    refuses(source, f"{first}_scale_inv: missing", f"{second}_scale_inv: shape must be [1, 2], got [1, 1]")


@pytest.mark.parametrize("block", [None, [4, 4], "absent"], ids=str)
def test_float8_that_is_no_matrix_is_refused(source, tensors, block):
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = np.ones(1, np.float32)
    settings = {"quant_method": "fp8"} if block == "absent" else {"quant_method": "fp8", "weight_block_size": block}
    tiny.write_folder(source, tensors, {**tiny.QWEN3, "quantization_config": settings})
    error = refuses(source, f"{source / 'model.safetensors'}: {name}", "needs a matrix", "[8]")
    assert len(error.problems) == 1


def test_unreadable_shards_are_reported(source, tensors):
    tiny.write_folder(source, tensors)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refuses(source, str(source / "model.safetensors"), "cannot be read")


def test_data_that_disappears_during_conversion_ends_in_an_error_and_no_output(source, tensors):
    tiny.write_folder(source, tensors)
    opened = open_checkpoint(source)
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    output = source.with_name("output")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside lm_head\.weight"):
        write_converted(opened, output)
    tiny.assert_nothing_that_looks_whole(output)
