"""Converted folders: what is in them, who can read them, and that they hold what the source holds."""

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoint as tiny
from support import golden_cases

from moe_jax.checkpoints import (
    CheckpointError,
    InMemoryCheckpoint,
    convert,
    inspect,
    open_checkpoint,
    verify,
    write_converted,
)

GATE_UP = "layers.0.feed_forward.routed_experts.gate_up_proj"
DOWN = "layers.0.feed_forward.routed_experts.down_proj"


@pytest.fixture
def source(tmp_path, rng):
    return tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng), shards=3)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def test_parameters_hold_the_checkpoints_numbers_where_the_tree_says(source, output):
    """From the definition of our tree: linear kernels are transposed, experts stacked, gate before up."""
    convert(source, output)
    tensors = tiny.read_folder(source)
    for reader in (open_checkpoint(source), open_checkpoint(output)):
        np.testing.assert_array_equal(reader.read("embedder.embedding"), tensors["model.embed_tokens.weight"])
        np.testing.assert_array_equal(reader.read("lm_head.kernel"), tensors["lm_head.weight"].T)
        prefix = "model.layers.1."
        np.testing.assert_array_equal(
            reader.read("layers.1.attention.o_proj.kernel"), tensors[f"{prefix}self_attn.o_proj.weight"].T
        )
        np.testing.assert_array_equal(
            reader.read("layers.1.feed_forward.router.weight"), tensors[f"{prefix}mlp.gate.weight"]
        )
        gate_up = reader.read("layers.1.feed_forward.routed_experts.gate_up_proj")
        down = reader.read("layers.1.feed_forward.routed_experts.down_proj")
        assert gate_up.shape == (5, 2, 6, 8)
        for expert in range(5):
            of_expert = f"{prefix}mlp.experts.{expert}."
            np.testing.assert_array_equal(gate_up[expert, 0], tensors[f"{of_expert}gate_proj.weight"])
            np.testing.assert_array_equal(gate_up[expert, 1], tensors[f"{of_expert}up_proj.weight"])
            np.testing.assert_array_equal(down[expert], tensors[f"{of_expert}down_proj.weight"])


@pytest.mark.parametrize("case", golden_cases.golden_cases(), ids=str)
def test_every_form_of_a_golden_case_holds_the_same_parameters(case):
    readers = {form: open_checkpoint(case.folder(form)) for form in case.forms}
    first, *others = readers.values()
    for path in first.shapes:
        expected = first.read(path, dtype=np.float32)
        for other in others:
            np.testing.assert_array_equal(other.read(path, dtype=np.float32), expected, err_msg=path)


def test_the_manifest_says_what_the_folder_holds(source, output):
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    report = convert(source, output)
    manifest = json.loads((output / "moe_jax.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["family"] == "qwen3_moe"
    assert manifest["source"]["form"] == "per_expert"
    assert len(manifest["source"]["digest"]) == 64
    assert sorted(manifest["parts"]) == sorted(path.name for path in (output / "parts").iterdir())
    assert len(manifest["parts"]) == report.parts
    assert {entry.name for entry in output.iterdir()} == {
        "moe_jax.json", "parts", "config.json", "generation_config.json", "tokenizer.json",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_a_part_is_restored_by_orbax_stable_api_alone(source, output):
    convert(source, output)
    part = output / "parts" / "layers.00000.experts.00000-00004"
    tree = ocp.PyTreeCheckpointer().restore(part)
    restored = tree["layers"]["0"]["feed_forward"]["routed_experts"]
    reader = open_checkpoint(output)
    np.testing.assert_array_equal(restored["gate_up_proj"], reader.read(GATE_UP))
    np.testing.assert_array_equal(restored["down_proj"], reader.read(DOWN))


def test_a_part_is_restored_by_orbax_onto_a_mesh(source, output):
    convert(source, output)
    reader = open_checkpoint(output)
    expected = reader.read("layers.0.attention.q_proj.kernel")
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x"))
    part = output / "parts" / "layers.00000.000"
    with ocp.StandardCheckpointer() as checkpointer:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(checkpointer.metadata(part).item_metadata)
        )
        kernel = abstract["layers"]["0"]["attention"]["q_proj"]
        kernel["kernel"] = jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=sharding)
        tree = checkpointer.restore(part, abstract)
    restored = tree["layers"]["0"]["attention"]["q_proj"]["kernel"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, expected)


@pytest.mark.parametrize("part_bytes", [400, 2000, 10**9])
def test_some_experts_are_read_without_touching_the_files_of_the_others(source, output, part_bytes):
    convert(source, output, part_bytes=part_bytes)
    reader = open_checkpoint(output)
    expected = reader.read(GATE_UP)
    chunks = {}
    for manifest_part, slices in json.loads((output / "moe_jax.json").read_text())["parts"].items():
        if GATE_UP in slices:
            for expert in range(*slices[GATE_UP]):
                local = expert - slices[GATE_UP][0]
                chunks[expert] = output / "parts" / manifest_part / GATE_UP / f"{local}.0.0.0"
    assert sorted(chunks) == list(range(5))
    for expert in (0, 3, 4):
        chunks[expert].unlink()
    np.testing.assert_array_equal(reader.read(GATE_UP, experts=range(1, 3)), expected[1:3])
    with pytest.raises(CheckpointError, match=r"gate_up_proj: cannot be read"):
        reader.read(GATE_UP)


@pytest.mark.parametrize("part_bytes", [200, 3000, 10**9])
def test_the_size_of_parts_changes_nothing_that_is_read(source, output, part_bytes):
    convert(source, output, part_bytes=part_bytes)
    original, copy = open_checkpoint(source), open_checkpoint(output)
    for path in original.shapes:
        np.testing.assert_array_equal(copy.read(path), original.read(path), err_msg=path)
        length = original.shapes[path][original.sliced_axis(path)]
        middle = (length // 3, length - length // 3)
        np.testing.assert_array_equal(copy.read_slice(path, *middle), original.read_slice(path, *middle), err_msg=path)


def test_fused_tensors_are_split_into_one_chunk_per_expert(output):
    case = golden_cases.golden_case("mixtral", "sliding")
    convert(case.folder("fused"), output)
    stored = tiny.read_folder(case.folder("fused"))
    gate_up = stored["model.layers.0.mlp.experts.gate_up_proj"]
    part = output / "parts" / "layers.00000.experts.00000-00008"
    for expert in range(9):
        assert (part / GATE_UP / f"{expert}.0.0.0").read_bytes() == gate_up[expert].tobytes()


def test_all_zero_parameters_are_stored_like_any_other(tmp_path, output):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tiny.qwen3_shapes().items()}
    source = tiny.write_folder(tmp_path / "zeros", tensors)
    convert(source, output)
    assert verify(source, output).ok


@pytest.mark.parametrize("experts", [range(0), range(5), range(2, 3), range(5, 5)])
def test_ranges_of_experts_are_slices_of_the_first_axis(source, output, experts):
    convert(source, output)
    for reader in (open_checkpoint(source), open_checkpoint(output)):
        for path in (GATE_UP, DOWN):
            np.testing.assert_array_equal(
                reader.read(path, experts=experts), reader.read(path)[experts.start : experts.stop]
            )


@pytest.mark.parametrize("experts", [range(3, 6), range(-1, 2), range(0, 4, 2)])
def test_experts_that_are_not_there_are_refused(source, experts):
    with pytest.raises(CheckpointError, match=r"within 0\.\.5, got"):
        open_checkpoint(source).read(GATE_UP, experts=experts)


def test_experts_of_a_parameter_without_them_are_refused(source):
    with pytest.raises(CheckpointError, match=r"final_norm\.scale has no axis of experts"):
        open_checkpoint(source).read("final_norm.scale", experts=range(1))


def all_readers(source, output):
    """The same model as every kind of checkpoint."""
    convert(source, output)
    reader = open_checkpoint(source)
    leaves = {path: reader.read(path) for path in reader.shapes}
    return reader, open_checkpoint(output), InMemoryCheckpoint(config=reader.config, leaves=leaves)


def test_an_unknown_parameter_is_refused_whatever_is_asked_of_it(source, output):
    path = "layers.9.nothing"
    for reader in all_readers(source, output):
        questions = [
            lambda reader: reader.read(path),
            lambda reader: reader.read_slice(path, 0, 1),
            lambda reader: reader.read_region(path, (slice(0, 1),)),
            lambda reader: reader.file_ranges(path, 0, 1),
            lambda reader: reader.dtype_of(path),
            lambda reader: reader.sliced_axis(path),
        ]
        for ask in questions:
            with pytest.raises(CheckpointError, match=r"there is no parameter 'layers\.9\.nothing'"):
                ask(reader)


@pytest.mark.parametrize(
    "path", [GATE_UP, "embedder.embedding", "layers.0.attention.q_proj.kernel", "final_norm.scale"]
)
def test_slices_and_regions_that_are_not_there_are_refused(source, output, path):
    for reader in all_readers(source, output):
        shape = reader.shapes[path]
        whole = [slice(0, length) for length in shape]
        regions = [tuple(whole[1:]), (*whole, slice(0, 1)), (slice(0, shape[0], 2), *whole[1:])]
        for axis, length in enumerate(shape):
            for start, stop in [(0, length + 1), (length, length + 1), (-1, length), (-1, 0), (1, 0)]:
                regions.append((*whole[:axis], slice(start, stop), *whole[axis + 1 :]))
                if axis != reader.sliced_axis(path):
                    continue
                for ask in (reader.read_slice, reader.file_ranges):
                    words = rf"a slice of {path} must be within 0\.\.{length}, got {start}\.\.{stop}"
                    with pytest.raises(CheckpointError, match=words):
                        ask(path, start, stop)
        for region in regions:
            with pytest.raises(CheckpointError, match=f"a region of {path} must be slices of step 1 within"):
                reader.read_region(path, region)


def test_dtype_converts_everything_but_what_must_stay_float32(tmp_path, output):
    case = next(case for case in golden_cases.golden_cases("deepseek_v3"))
    convert(case.folder("per_expert"), output, dtype=ml_dtypes.bfloat16)
    reader, original = open_checkpoint(output), open_checkpoint(case.folder("per_expert"))
    biases = [path for path in reader.shapes if path.endswith("correction_bias")]
    assert biases
    for path in reader.shapes:
        expected = np.float32 if path in biases else ml_dtypes.bfloat16
        assert reader.dtype_of(path) == expected, path
        np.testing.assert_array_equal(reader.read(path), original.read(path).astype(expected), err_msg=path)
    report = verify(case.folder("per_expert"), output)
    assert report.ok
    assert report.converted[GATE_UP.replace(".0.", ".1.")] == "float32 -> bfloat16"


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such dtype"])
def test_dtypes_that_parameters_cannot_have_are_refused(source, output, dtype):
    with pytest.raises(CheckpointError, match=dtype):
        convert(source, output, dtype=dtype)
    assert not output.exists()


def test_rotary_buffers_and_a_tied_output_table_are_left_out_and_named(tmp_path, rng):
    config = {**tiny.QWEN3, "tie_word_embeddings": True}
    tensors = tiny.random_tensors(rng)
    dropped = {
        "lm_head.weight": "tied to the embedding table",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "rotary frequencies follow from the configuration",
    }
    tensors |= {name: np.ones(2, np.float32) for name in dropped if name != "lm_head.weight"}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = tiny.write_folder(tmp_path / "source", tensors, config)
    report = convert(source, tmp_path / "output")
    assert report.dropped == dropped
    assert verify(source, tmp_path / "output").dropped == dropped
    assert inspect(tmp_path / "output").dropped == dropped


@pytest.mark.parametrize("said", [{"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 2}, {}], ids=str)
@pytest.mark.parametrize("name", ["deepseek_v3-negative_bias", "glm4_moe-qk_norm"])
def test_layers_for_multi_token_prediction_are_left_out_and_named(tmp_path, name, said):
    """`transformers` assumes one where config.json doesn't say how many."""
    case = golden_cases.golden_case(*name.split("-"))
    source = case.write_hub_style_folder("per_expert", tmp_path / "source")
    config = {key: value for key, value in case.config().items() if key != "num_nextn_predict_layers"}
    (source / "config.json").write_text(json.dumps({**config, **said}))
    depth = config["num_hidden_layers"]
    report = convert(source, tmp_path / "output")
    assert set(report.dropped) == set(case.dropped_tensors)
    assert set(report.dropped.values()) == {f"layer {depth} of a decoder with {depth} layers (multi-token prediction)"}


def test_blocks_are_those_of_transformers_where_the_configuration_gives_no_size(tmp_path, rng):
    config = {**tiny.QWEN3, "hidden_size": 136, "quantization_config": {"quant_method": "fp8"}}
    tensors = tiny.random_tensors(rng, config)
    name = "model.layers.0.self_attn.o_proj.weight"  # [136, 8]: two blocks of 128 rows, the second ragged
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = np.array([[0.5], [4.0]], np.float32)
    source = tiny.write_folder(tmp_path / "source", tensors, config)
    read = open_checkpoint(source).read("layers.0.attention.o_proj.kernel")
    expected = tensors[name].astype(np.float32) * np.where(np.arange(136) < 128, 0.5, 4.0)[:, None]
    np.testing.assert_array_equal(read, expected.T)


def test_block_fp8_with_ragged_blocks_and_any_scale_dtype_is_decoded(tmp_path, rng):
    tensors = tiny.random_tensors(rng)
    quantized = {
        "model.layers.0.self_attn.q_proj.weight": np.float32,
        "model.layers.1.self_attn.o_proj.weight": ml_dtypes.bfloat16,
        **{
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": ml_dtypes.float8_e8m0fnu
            for expert in range(5)
            for name in ("gate_proj", "up_proj", "down_proj")
        },
    }
    expected = {}
    for name, scale_dtype in quantized.items():
        weights = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        rows, columns = weights.shape
        scales = 2.0 ** rng.integers(-3, 4, (-(-rows // 5), -(-columns // 3)))
        spread = scales[np.arange(rows)[:, None] // 5, np.arange(columns)[None] // 3]
        expected[name] = weights.astype(np.float32) * spread
        tensors[name], tensors[f"{name}_scale_inv"] = weights, scales.astype(scale_dtype)
    settings = {"quant_method": "fp8", "weight_block_size": [5, 3], "activation_scheme": "dynamic"}
    source = tiny.write_folder(tmp_path / "source", tensors, {**tiny.QWEN3, "quantization_config": settings})
    report = convert(source, tmp_path / "output")
    assert report.quantization == "fp8"
    reader = open_checkpoint(tmp_path / "output")
    np.testing.assert_array_equal(
        reader.read("layers.0.attention.q_proj.kernel"), expected["model.layers.0.self_attn.q_proj.weight"].T
    )
    np.testing.assert_array_equal(
        reader.read("layers.1.attention.o_proj.kernel"), expected["model.layers.1.self_attn.o_proj.weight"].T
    )
    for expert in range(5):
        block = f"model.layers.0.mlp.experts.{expert}."
        np.testing.assert_array_equal(reader.read(GATE_UP)[expert, 0], expected[f"{block}gate_proj.weight"])
        np.testing.assert_array_equal(reader.read(GATE_UP)[expert, 1], expected[f"{block}up_proj.weight"])
        np.testing.assert_array_equal(reader.read(DOWN)[expert], expected[f"{block}down_proj.weight"])


def test_fused_block_fp8_is_decoded(tmp_path, rng):
    tensors = tiny.random_tensors(rng)
    expected = {}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts."
        for name in [name for name in tensors if name.startswith(block)]:
            del tensors[name]
        for name, shape, grid in (("gate_up_proj", (5, 12, 8), (5, 6, 2)), ("down_proj", (5, 8, 6), (5, 4, 2))):
            weights = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.5, 2, grid).astype(np.float32)
            spread = scales[:, np.arange(shape[1])[:, None] // 2, np.arange(shape[2])[None] // 4]
            expected[block + name] = weights.astype(np.float32) * spread
            tensors |= {block + name: weights, f"{block}{name}_scale_inv": scales}
    settings = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    source = tiny.write_folder(tmp_path / "source", tensors, {**tiny.QWEN3, "quantization_config": settings})
    reader = open_checkpoint(source)
    assert reader.form == "fused"
    gate_up = expected["model.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(reader.read(GATE_UP)[:, 0], gate_up[:, :6])
    np.testing.assert_array_equal(reader.read(GATE_UP, experts=range(2, 4))[:, 1], gate_up[2:4, 6:])
    np.testing.assert_array_equal(reader.read(DOWN), expected["model.layers.0.mlp.experts.down_proj"])


def test_one_multiplier_per_matrix_is_decoded_when_there_is_no_block_size(tmp_path, rng):
    tensors = tiny.random_tensors(rng)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = np.array(0.25, np.float32)
    settings = {"quant_method": "fp8", "weight_block_size": None}
    source = tiny.write_folder(tmp_path / "source", tensors, {**tiny.QWEN3, "quantization_config": settings})
    read = open_checkpoint(source).read("layers.0.attention.q_proj.kernel")
    np.testing.assert_array_equal(read, tensors[name].astype(np.float32).T * 0.25)


def test_progress_starts_at_zero_grows_and_ends_at_the_total(source, output):
    events = []
    report = convert(source, output, part_bytes=1000, progress=events.append)
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == report.nbytes
    assert {event.total_bytes for event in events} == {report.nbytes}
    assert len(events) == 1 + report.parts


def test_a_model_in_memory_is_written_and_read_back(source, output):
    original = open_checkpoint(source)
    leaves = {path: jax.numpy.asarray(original.read(path)) for path in original.shapes}
    write_converted(InMemoryCheckpoint(config=original.config, leaves=leaves, folder=source), output)
    assert verify(source, output).ok


def test_a_model_in_memory_must_have_exactly_the_parameters_of_its_configuration(source, output):
    original = open_checkpoint(source)
    leaves = {path: original.read(path) for path in original.shapes if path != "final_norm.scale"}
    with pytest.raises(CheckpointError, match=r"final_norm\.scale: missing(\n|.)*surprise: unexpected"):
        InMemoryCheckpoint(config=original.config, leaves={**leaves, "surprise": np.zeros(1)})
    with pytest.raises(CheckpointError, match=r"final_norm\.scale: shape must be \[8\], got \[9\]"):
        write_converted(
            InMemoryCheckpoint(config=original.config, leaves={**leaves, "final_norm.scale": np.zeros(9)}), output
        )


def test_a_converted_folder_can_be_converted_again(source, output):
    convert(source, output)
    again = output.with_name("again")
    convert(output, again, dtype="bfloat16")
    assert verify(source, again).ok
    assert open_checkpoint(again).dtype_of(GATE_UP) == ml_dtypes.bfloat16
