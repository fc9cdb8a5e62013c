"""A finite number that the dtype asked for cannot hold is refused; infinities that are in the file are not."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import CheckpointError, InMemoryCheckpoint, convert, export, open_checkpoint, write_converted

CONFIG = {**tiny.QWEN3, "torch_dtype": None}
COPIED = "model.norm.weight"
TRANSPOSED = "model.layers.0.self_attn.q_proj.weight"
OF_AN_EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
PLACES = (COPIED, TRANSPOSED, OF_AN_EXPERT)


def spoil(tensors, name, value, rng):
    """Put `value` at a random place of a tensor."""
    tensors[name][tuple(rng.integers(0, tensors[name].shape))] = value


@pytest.fixture(autouse=True)
def _in_many_steps(monkeypatch):
    """Tensors of real models are read, cast and looked at in many steps, of whole rows; here these tiny ones are, too."""
    monkeypatch.setattr("moe_jax.checkpoints.stored_rows._CAST_BYTES", 40)
    monkeypatch.setattr("moe_jax.checkpoints.casting._STEP", 10)
    monkeypatch.setattr("moe_jax.checkpoints.huggingface._TRANSPOSED_ROWS", 3)


@pytest.fixture
def tensors(rng):
    return tiny.random_tensors(rng, dtype=ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [65536.0, -1e6, 3e38])
@pytest.mark.parametrize("write", [convert, export], ids=["convert", "export"])
def test_a_number_beyond_float16_is_refused_with_file_and_tensor(tmp_path, tensors, rng, name, value, write):
    spoil(tensors, name, value, rng)
    source = tiny.write_folder(tmp_path / "source", tensors, CONFIG)
    with pytest.raises(
        CheckpointError, match=r"beyond the range of float16 \(up to 6\.55e\+04\); choose bfloat16"
    ) as caught:
        write(source, tmp_path / "output", dtype="float16")
    assert f"{source / 'model.safetensors'}: {name}: holds {abs(float(tensors[name].dtype.type(value))):.4g}" in str(
        caught.value
    )
    tiny.assert_nothing_that_looks_whole(tmp_path / "output")
    write(source, tmp_path / "kept")
    write(source, tmp_path / "wider", dtype="float32")


def test_the_largest_numbers_of_float16_are_held(tmp_path, tensors, rng):
    for name, value in zip(PLACES, (65504.0, -65280.0, 6e-8), strict=True):
        tensors[name] = tensors[name].astype(np.float32)
        spoil(tensors, name, value, rng)
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    source = tiny.write_folder(tmp_path / "source", tensors, CONFIG)
    convert(source, tmp_path / "output", dtype="float16")
    read = open_checkpoint(tmp_path / "output").read
    np.testing.assert_array_equal(read("final_norm.scale"), tensors[COPIED].astype(np.float16))
    np.testing.assert_array_equal(read("layers.0.attention.q_proj.kernel"), tensors[TRANSPOSED].T.astype(np.float16))
    up = read("layers.1.feed_forward.routed_experts.gate_up_proj")[2, 1]
    np.testing.assert_array_equal(up, tensors[OF_AN_EXPERT].astype(np.float16))


@pytest.mark.parametrize("name", PLACES)
def test_a_float32_number_beyond_bfloat16_is_refused(tmp_path, rng, name):
    tensors = tiny.random_tensors(rng)
    spoil(tensors, name, np.finfo(np.float32).max, rng)  # rounds up to infinity
    source = tiny.write_folder(tmp_path / "source", tensors, CONFIG)
    with pytest.raises(
        CheckpointError, match=f"{name}: holds 3.403e.38, beyond the range of bfloat16 (.*); choose float32"
    ):
        convert(source, tmp_path / "output", dtype="bfloat16")


@pytest.mark.parametrize("name", PLACES)
def test_infinities_and_nan_of_the_file_are_kept(tmp_path, tensors, rng, name):
    for value in (np.inf, -np.inf, np.nan):
        spoil(tensors, name, value, rng)
    source = tiny.write_folder(tmp_path / "source", tensors, CONFIG)
    convert(source, tmp_path / "output", dtype="float16")
    path = {
        COPIED: "final_norm.scale",
        TRANSPOSED: "layers.0.attention.q_proj.kernel",
        OF_AN_EXPERT: "layers.1.feed_forward.routed_experts.gate_up_proj",
    }[name]
    read = np.asarray(open_checkpoint(tmp_path / "output").read(path), np.float32)
    expected = open_checkpoint(source).read(path, dtype=np.float32)
    np.testing.assert_array_equal(read, expected.astype(np.float16).astype(np.float32))
    assert not np.isfinite(read).all()


def test_decoded_numbers_beyond_float16_are_refused_and_multipliers_of_other_numbers_are_not(tmp_path, tensors, rng):
    weights = np.array(rng.uniform(0.5, 1, (8, 8)), ml_dtypes.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": None}
    config = {**CONFIG, "quantization_config": settings}
    for scale, fits in ((60_000.0, True), (200_000.0, False)):  # 448 of either is beyond
        tensors[TRANSPOSED], tensors[f"{TRANSPOSED}_scale_inv"] = weights, np.array(scale, np.float32)
        source = tiny.write_folder(tmp_path / f"source {fits}", tensors, config)
        if fits:
            convert(source, tmp_path / "fits", dtype="float16")
        else:
            with pytest.raises(CheckpointError, match=f"{TRANSPOSED}: holds (.*) beyond the range of float16"):
                convert(source, tmp_path / "output", dtype="float16")


@pytest.mark.parametrize("name", PLACES)
def test_a_converted_folder_and_a_model_in_memory_refuse_it_too(tmp_path, tensors, rng, name):
    spoil(tensors, name, 1e6, rng)
    source = tiny.write_folder(tmp_path / "source", tensors, CONFIG)
    convert(source, tmp_path / "converted")
    for write in (convert, export):
        with pytest.raises(CheckpointError, match=r"parts/\S+: \S+: holds 9\.994e\+05, beyond the range of float16"):
            write(tmp_path / "converted", tmp_path / write.__name__, dtype="float16")
    reader = open_checkpoint(source)
    leaves = {path: jnp.asarray(reader.read(path)) for path in reader.shapes}
    in_memory = InMemoryCheckpoint(config=reader.config, leaves=leaves)
    with pytest.raises(CheckpointError, match=r"holds 9\.994e\+05, beyond the range of float16"):
        write_converted(in_memory, tmp_path / "saved", dtype="float16")
