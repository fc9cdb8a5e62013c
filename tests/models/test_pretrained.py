"""Loading and saving models: dtypes, converted folders, meshes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file
from support import golden_cases
from support.golden_models import QUICK_TO_COMPILE, TOLERANCE, golden_model, relative_error

from moe_jax import from_pretrained, save_pretrained
from moe_jax.checkpoints import CheckpointError, convert, open_checkpoint
from moe_jax.config import ParallelConfig
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import parameter_sources

RENORMALIZED = golden_cases.golden_case("qwen3_moe", "renormalized")
STORED_IN_BFLOAT16 = golden_cases.golden_case("mixtral", "full_tied")
CORRECTION_BIAS = golden_cases.golden_case("glm4_moe", golden_cases.golden_cases("glm4_moe")[0].name)


def parameters(model):
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def test_without_a_dtype_parameters_keep_that_of_the_file_and_computation_follows_the_embedding():
    model = from_pretrained(STORED_IN_BFLOAT16.folder("fused"))
    assert {array.dtype for array in parameters(model).values()} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.bfloat16
    assert golden_model(RENORMALIZED).dtype == jnp.float32


def test_the_correction_bias_stays_float32_whatever_dtype_is_asked_for():
    model = from_pretrained(CORRECTION_BIAS.folder("fused"), dtype=jnp.bfloat16)
    for path, array in parameters(model).items():
        assert array.dtype == (jnp.float32 if path[-1] == "correction_bias" else jnp.bfloat16), path
    assert any(path[-1] == "correction_bias" for path in parameters(model))


@pytest.mark.parametrize(("dtype", "got"), [("bf16", "'bf16'"), (np.float64, "'float64'"), (jnp.int8, "'int8'")])
def test_a_dtype_that_parameters_cannot_have_is_refused_with_those_that_they_can(dtype, got, tmp_path):
    message = f"dtype must be one of bfloat16, float16, float32; got {got}"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(RENORMALIZED.folder("fused"), dtype=dtype)
    with pytest.raises(CheckpointError, match=message):
        convert(RENORMALIZED.folder("fused"), tmp_path / "converted", dtype=dtype)


def test_values_are_bit_for_bit_those_of_the_file():
    model = golden_model(RENORMALIZED, "per_expert")
    tensors = load_file(RENORMALIZED.folder("per_expert") / "model.safetensors")
    loaded = {}
    for path, source in parameter_sources(model).items():
        array = np.asarray(parameters(model)[path])
        loaded |= {source: array} if isinstance(source, str) else dict(zip(source, array, strict=True))
    np.testing.assert_array_equal(loaded["embedder.embedding"], tensors["model.embed_tokens.weight"])
    for layer, expert in ((0, 3), (2, 8)):
        block = f"model.layers.{layer}.mlp.experts.{expert}"
        gate_up = loaded[f"layers.{layer}.feed_forward.routed_experts.gate_up_proj"][expert]
        np.testing.assert_array_equal(gate_up[0], tensors[f"{block}.gate_proj.weight"])
        np.testing.assert_array_equal(gate_up[1], tensors[f"{block}.up_proj.weight"])
    kernel = loaded["layers.1.attention.q_proj.kernel"]
    np.testing.assert_array_equal(kernel, tensors["model.layers.1.self_attn.q_proj.weight"].T)


def test_a_saved_model_is_loaded_again_with_the_same_bits(tmp_path):
    model = golden_model(RENORMALIZED)
    save_pretrained(model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.decoder == model.decoder
    assert again.hf_config == model.hf_config
    jax.tree.map(np.testing.assert_array_equal, parameters(again), parameters(model))
    with pytest.raises(CheckpointError):
        save_pretrained(model, tmp_path / "saved")


def with_generation_settings(folder):
    """A copy of a golden checkpoint whose `generation_config.json` is known."""
    shutil.copytree(RENORMALIZED.folder("fused"), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    return folder


def test_generation_settings_are_saved_though_the_process_changed_its_folder(tmp_path, monkeypatch):
    with_generation_settings(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = from_pretrained("model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    save_pretrained(model, "saved")
    assert (tmp_path / "elsewhere" / "saved" / "generation_config.json").read_text() == '{"eos_token_id": 3}'


@pytest.mark.parametrize("inner", [".", "inner"])
def test_saving_never_removes_the_folder_that_the_model_was_loaded_from(tmp_path, inner):
    for folder in (tmp_path / "all", tmp_path / "all" / inner):
        shutil.copytree(RENORMALIZED.folder("per_expert"), folder, dirs_exist_ok=True)
    model = from_pretrained(tmp_path / "all" / inner)
    before = sorted((tmp_path / "all").rglob("*"))
    with pytest.raises(CheckpointError, match=r"same folder|lies in this folder, which will not be overwritten"):
        save_pretrained(model, tmp_path / "all", overwrite=True)
    assert sorted((tmp_path / "all").rglob("*")) == before


def test_a_revision_is_that_of_a_model_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(source, **options):
        asked.append((source, options["revision"]))
        return str(RENORMALIZED.folder("per_expert"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    from_pretrained("somebody/tiny", revision="v2")
    assert set(asked) == {("somebody/tiny", "v2")}
    with pytest.raises(CheckpointError, match="has no revision 'v2'"):
        from_pretrained(RENORMALIZED.folder("per_expert"), revision="v2")


def test_a_model_whose_source_folder_is_gone_is_saved_with_a_warning_that_says_what_is_missing(tmp_path):
    model = from_pretrained(with_generation_settings(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    missing = r"model, which the model was loaded from, is no longer there: .*saved gets no tokenizer"
    with pytest.warns(UserWarning, match=missing) as caught:
        save_pretrained(model, tmp_path / "saved")
    assert caught[0].filename == __file__
    jax.tree.map(np.testing.assert_array_equal, parameters(from_pretrained(tmp_path / "saved")), parameters(model))
    model.source_folder = str(tmp_path / "moved")
    save_pretrained(model, tmp_path / "saved", overwrite=True)
    assert (tmp_path / "saved" / "generation_config.json").read_text() == '{"eos_token_id": 3}'


def test_a_model_saved_in_another_dtype_says_so_in_its_config_json(tmp_path):
    model = from_pretrained(STORED_IN_BFLOAT16.folder("fused"), dtype=jnp.float32)
    assert model.hf_config["dtype"] == "bfloat16"
    save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


def test_a_changed_model_is_saved_as_it_is_now(tmp_path):
    model = from_pretrained(RENORMALIZED.folder("fused"))
    model.final_norm.scale[...] = model.final_norm.scale[...] + 1.5
    save_pretrained(model, tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved").read("final_norm.scale")
    np.testing.assert_array_equal(saved, model.final_norm.scale[...])


def test_a_model_without_a_config_json_cannot_be_saved(tmp_path):
    decoder = golden_model(RENORMALIZED).decoder
    model = nnx.eval_shape(lambda: CausalLM(decoder, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the model has no hf_config"):
        save_pretrained(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("shape", "parallel"),
    [
        ((4, 2), None),
        ((4, 2), ParallelConfig(expert_axis="a", data_axis="b")),
        ((2, 4), ParallelConfig(expert_axis="a", tensor_axis="b")),
    ],
    ids=str,
)
def test_on_eight_devices_logits_are_those_of_one(shape, parallel):
    case = golden_cases.golden_case("qwen3_moe", "raw_probabilities")  # 12 experts
    if parallel is None:
        shape = (2, 2)
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(shape)])
    model = from_pretrained(case.folder("fused"), dtype=np.float32, mesh=mesh, parallel=parallel)
    experts = next(array for path, array in parameters(model).items() if path[-1] == "gate_up_proj")
    assert experts.addressable_shards[0].data.size == experts.size // (
        experts.sharding.num_devices // (1 if parallel is None or parallel.tensor_axis else shape[1])
    )

    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids), compiler_options=QUICK_TO_COMPILE)
    expected = case.expected()
    assert relative_error(forward(state, jnp.asarray(expected.input_ids)), expected.logits) < TOLERANCE


def test_a_parallel_config_needs_a_mesh():
    with pytest.raises(ValueError, match="parallel needs mesh="):
        from_pretrained(RENORMALIZED.folder("fused"), parallel=ParallelConfig(expert_axis="a"))


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_an_unsupported_setting_of_a_checkpoint_is_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(RENORMALIZED.folder("fused"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 2.0}))
    with pytest.raises(CheckpointError, match="logit_scale=2.0"):
        from_pretrained(folder)
