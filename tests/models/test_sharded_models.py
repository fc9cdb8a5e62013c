"""Whole models on eight simulated devices: logits, shares of parameters and cache, and what the compiled programs move."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support import golden_cases
from support.golden_models import QUICK_TO_COMPILE, TOLERANCE, golden_model, relative_error
from support.small_models import small_decoder

from moe_jax import ParallelConfig, from_pretrained, save_pretrained
from moe_jax.checkpoints import open_checkpoint
from moe_jax.generation import GenerationSettings, generate
from moe_jax.generation.programs import bucket, compile_programs, signature_of
from moe_jax.models import CausalLM, causal_lm, softmax_attention
from moe_jax.models.parameter_sources import parameter_shardings, parameter_sources
from moe_jax.models.partitioning import Partitioning
from moe_jax.parallel import create_mesh, parallel_of

ALL_AXES = {"data": 2, "expert": 2, "tensor": 2}
QWEN = golden_cases.golden_case(
    "qwen3_moe", "raw_probabilities"
)  # 12 experts, a dense layer, 4 query and 2 key/value heads
LATENT = golden_cases.golden_case("deepseek_v3", "negative_bias")  # 12 experts, latent attention, shared experts
SINKS = golden_cases.golden_case("gpt_oss", "bfloat16")  # 12 experts, attention sinks and biases

# The ranks that share tokens must divide experts and the width of shared experts.
MESHES = {
    12: ({"expert": 4}, ALL_AXES, {"tensor": 2, "expert": 2}),
    9: ({"tensor": 2}, {"data": 2, "tensor": 2}, {"data": 4}),
}


def load(case, sizes):
    return from_pretrained(case.folder(case.forms[0]), dtype=np.float32, mesh=create_mesh(sizes))


def logits_of(model, ids):
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids), compiler_options=QUICK_TO_COMPILE)
    return np.asarray(forward(state, jnp.asarray(ids)))


def one_mesh_per_case():
    turn = {experts: itertools.cycle(meshes) for experts, meshes in MESHES.items()}
    for case in golden_cases.golden_cases():
        config = case.config()
        experts = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
        yield case, next(turn[experts])


IN_EVERY_RUN = [(QWEN, ALL_AXES), (SINKS, {"tensor": 2})]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in one_mesh_per_case() if pair not in IN_EVERY_RUN]


@pytest.mark.parametrize(("case", "sizes"), [*IN_EVERY_RUN, *SLOW], ids=str)
def test_logits_on_a_mesh_are_those_of_transformers(case, sizes):
    expected = case.expected()
    assert relative_error(logits_of(load(case, sizes), expected.input_ids), expected.logits) < TOLERANCE


@pytest.fixture(scope="module")
def model():
    return load(QWEN, ALL_AXES)


def test_logits_on_a_mesh_are_those_of_one_device(model):
    ids = QWEN.expected().left_input_ids[:1, :13]  # one row, which two data ranks cannot split
    assert relative_error(logits_of(model, ids), logits_of(golden_model(QWEN), ids)) < 1e-5


def number_of_parts(model):
    """Path of a parameter (of the first layer, if several are stacked) -> how many parts it is split into."""
    found, variables = {}, dict(nnx.to_flat_state(nnx.state(model)))
    for path, source in parameter_sources(model).items():
        array = variables[path][...]
        part = array.sharding.shard_shape(array.shape)
        found[source if isinstance(source, str) else source[0]] = array.size // math.prod(part)
    return found


def test_ranks_that_hold_the_same_tokens_split_every_matrix(model):
    parts = number_of_parts(model)  # two expert and two tensor ranks hold the same tokens
    assert {path: count for path, count in parts.items() if "layers.0." in path or "layers" not in path} == {
        "embedder.embedding": 4,
        "final_norm.scale": 1,
        "layers.0.attention_norm.scale": 1,
        "layers.0.feed_forward_norm.scale": 1,
        "layers.0.attention.q_proj.kernel": 4,
        "layers.0.attention.q_proj.bias": 4,
        "layers.0.attention.k_proj.kernel": 2,
        "layers.0.attention.k_proj.bias": 2,
        "layers.0.attention.v_proj.kernel": 2,
        "layers.0.attention.v_proj.bias": 2,
        "layers.0.attention.o_proj.kernel": 4,
        "layers.0.attention.o_proj.bias": 1,
        "layers.0.attention.q_norm.scale": 1,
        "layers.0.attention.k_norm.scale": 1,
        "layers.0.feed_forward.gate_proj.kernel": 4,
        "layers.0.feed_forward.up_proj.kernel": 4,
        "layers.0.feed_forward.down_proj.kernel": 4,
    }
    assert parts["layers.1.feed_forward.routed_experts.gate_up_proj"] == 4
    assert parts["layers.1.feed_forward.router.weight"] == 1


def test_slots_with_copies_of_experts_are_filled_and_left_out_when_saved(tmp_path):
    """Also latent attention, which is split by query heads."""
    mesh = create_mesh({"expert": 4})
    model = from_pretrained(LATENT.folder("fused"), dtype=np.float32, mesh=mesh, num_redundant_experts=4)
    mixture = model.stacks[0].blocks[0].feed_forward
    assert mixture.routed_experts.gate_up_proj.shape[1] == 16
    parts = number_of_parts(model)
    split = {
        path.removeprefix("layers.0.attention.") for path, count in parts.items() if count == 4 and ".0.att" in path
    }
    assert split == {"q_proj.kernel", "kv_b_proj.kernel", "o_proj.kernel"}

    expected = LATENT.expected()
    assert relative_error(logits_of(model, expected.input_ids), expected.logits) < TOLERANCE
    save_pretrained(model, tmp_path / "saved")
    saved, original = open_checkpoint(tmp_path / "saved"), open_checkpoint(LATENT.folder("fused"))
    assert saved.shapes == original.shapes
    for path in original.shapes:
        np.testing.assert_array_equal(saved.read(path), original.read(path), err_msg=path)


def test_what_does_not_divide_stays_whole_and_is_said(model):
    assert model.partitioning_remarks == (
        "2 key/value heads cannot be split over the 4 ranks of ('expert', 'tensor'): split 2 ways (over expert)",
    )
    partitioning = Partitioning.of(ParallelConfig(tensor_axis="tensor"), create_mesh({"tensor": 3}))
    assert partitioning.axes_for(4) == ()
    assert partitioning.axes_for(9) == ("tensor",)
    assert "4 query heads cannot be split over the 3 ranks of ('tensor',): held whole by each rank" in (
        partitioning.remarks(model.decoder)
    )


def test_what_stays_whole_in_any_layer_is_said_once():
    partitioning = Partitioning.of(ParallelConfig(tensor_axis="tensor"), create_mesh({"tensor": 3}))
    remarks = partitioning.remarks(small_decoder(num_hidden_layers=3, mlp_only_layers=[1, 2]))
    whole = ["4 intermediate features", "2 key/value heads", "2 query heads", "16 vocabulary entries"]
    assert [remark.split(" cannot be split")[0] for remark in remarks] == whole


def test_axes_that_split_the_batch_split_no_dense_part():
    mesh = create_mesh({"data": 2, "tensor": 2})
    parallel = ParallelConfig(expert_axis=("data", "tensor"), data_axis="data")
    partitioning = Partitioning.of(parallel, mesh)
    assert (partitioning.batch, partitioning.shared) == (("data",), ("tensor",))
    assert partitioning.batch_axes_for(6) == ("data",)
    assert partitioning.batch_axes_for(3) == ()


def test_axes_are_taken_in_the_order_of_the_mesh_and_from_the_first_one_on():
    partitioning = Partitioning.of(
        ParallelConfig(expert_axis="expert", tensor_axis="tensor"), create_mesh({"tensor": 4, "expert": 2})
    )
    assert partitioning.shared == ("tensor", "expert")
    assert partitioning.axes_for(8) == ("tensor", "expert")
    assert partitioning.axes_for(4) == ("tensor",)
    # Not over `expert` alone, whose ranks would hold other heads than their queries'.
    assert partitioning.axes_for(2) == ()


def test_tokens_and_caches_are_split_by_rows_and_heads_and_latents_only_by_rows():
    mesh = create_mesh({"data": 2, "tensor": 2})
    partitioning = Partitioning.of(ParallelConfig(data_axis="data", tensor_axis="tensor"), mesh)
    constrain_tokens, constrain_cache = partitioning.constrain_tokens, partitioning.constrain_cache
    for constrain, shape, spec in (
        (constrain_tokens, (6, 5, 8), PartitionSpec("data")),
        (constrain_tokens, (3, 5, 8), PartitionSpec()),
        (constrain_cache, (3, 6, 5, 4, 8), PartitionSpec(None, "data", None, "tensor")),
        (constrain_cache, (2, 3, 5, 4, 8), PartitionSpec(None, None, None, "tensor")),
        (constrain_cache, (2, 6, 5, 3, 8), PartitionSpec(None, "data")),
        (constrain_cache, (2, 6, 5, 8), PartitionSpec(None, "data")),  # latents
    ):
        sharding = constrain(jnp.zeros(shape)).sharding
        assert sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shape)), (shape, sharding)


@functools.cache
def created(**sizes):
    """Three stacked layers, which two ranks do not divide."""
    mesh = create_mesh(sizes) if sizes else None
    parallel = parallel_of(mesh) if sizes else None
    return CausalLM(
        small_decoder(num_hidden_layers=3), rngs=nnx.Rngs(0), mesh=mesh, parallel=parallel, num_redundant_experts=2
    )


def test_a_model_created_on_a_mesh_is_split_like_a_loaded_one():
    model = created(expert=2)
    shardings = parameter_shardings(model)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable[...].sharding.is_equivalent_to(shardings[path], variable[...].ndim), path
    experts = np.asarray(model.stacks[0].blocks[0].feed_forward.routed_experts.down_proj[...])
    assert len(np.unique(experts[:, :4])) == experts[:, :4].size
    np.testing.assert_array_equal(experts[:, 4:], experts[:, :2])


def test_four_ranks_that_split_the_rows_of_dense_layers_do_a_quarter_of_the_work_each():
    """Though all of them are given all ids."""

    def operations(mesh):
        """Of one device."""
        parallel, given = (None, None) if mesh is None else (parallel_of(mesh), NamedSharding(mesh, PartitionSpec()))
        decoder = small_decoder(num_hidden_layers=2, mlp_only_layers=[0, 1])
        model = nnx.eval_shape(lambda: CausalLM(decoder, rngs=nnx.Rngs(0), mesh=mesh, parallel=parallel))
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, ids: nnx.merge(graph, state).hidden_states(ids)[0], in_shardings=given)
        ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
        return run.lower(state, ids).compile(QUICK_TO_COMPILE).cost_analysis()["flops"]

    assert operations(create_mesh({"data": 4})) < 1.2 * operations(None) / 4


def small_model_on(mesh):
    """`f(rngs)`."""
    return lambda rngs: CausalLM(small_decoder(num_hidden_layers=1), rngs=rngs, mesh=mesh, parallel=parallel_of(mesh))


def test_a_model_created_in_a_traced_function_is_split_like_any_other():
    create = small_model_on(create_mesh(ALL_AXES))
    model = nnx.jit(create)(nnx.Rngs(0))
    shardings = parameter_shardings(model)
    assert PartitionSpec(("expert", "tensor")) in {sharding.spec for sharding in shardings.values()}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable[...].sharding.is_equivalent_to(shardings[path], variable[...].ndim), path
    abstract = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    shapes = [{p: v.shape for p, v in nnx.to_flat_state(nnx.state(m))} for m in (abstract, model)]
    assert shapes[0] == shapes[1]


def test_layers_are_created_in_shares_and_not_whole_on_every_device_first(monkeypatch):
    monkeypatch.setattr(causal_lm, "placed", lambda value, _: value)  # what splits the rest afterwards
    model = small_model_on(create_mesh({"expert": 4}))(nnx.Rngs(0))
    shardings = parameter_shardings(model)
    for path, variable in nnx.to_flat_state(nnx.state(model.stacks)):
        assert variable[...].sharding.is_equivalent_to(shardings["stacks", *path], variable[...].ndim), path


def test_models_created_by_a_vectorized_function_are_each_split_as_one_alone():
    create = small_model_on(create_mesh({"expert": 4}))  # more ranks than models
    shardings = parameter_shardings(create(nnx.Rngs(0)))
    models = nnx.vmap(lambda key: create(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    for path, variable in nnx.to_flat_state(nnx.state(models)):
        expected = NamedSharding(shardings[path].mesh, PartitionSpec(None, *shardings[path].spec))
        assert variable[...].sharding.is_equivalent_to(expected, variable[...].ndim), path


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"expert": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_what_is_drawn_for_parameters_does_not_depend_on_the_mesh(sizes):
    states = (nnx.state(model) for model in (created(), created(**sizes)))
    for (path, alone), (_, on_mesh) in zip(*map(nnx.to_flat_state, states), strict=True):
        np.testing.assert_allclose(on_mesh[...], alone[...], rtol=1e-5, atol=1e-7, err_msg=str(path))


COLLECTIVE = re.compile(
    r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
)


def programs_of(model, prompts, **options):
    """Those that generate six tokens."""
    sizes = dict(batch_size=2, prompt_length=bucket(max(map(len, prompts))), room=bucket(6), num_eos=0, do_sample=False)
    signature, _ = signature_of(model, **sizes, top_k=None, use_top_p=False, with_expert_load=False, **options)
    return compile_programs(signature)


def elements_moved(program):
    """Of each collective's result."""
    found = COLLECTIVE.findall(program.as_text())
    return [math.prod(map(int, filter(None, dims.split(",")))) for dims in found]


def test_generating_on_a_mesh_gives_the_tokens_of_transformers_and_moves_only_tokens(model):
    """Nothing of the size of a cache or an embedding table goes over the mesh."""
    expected = QWEN.expected()
    prompts, settings = expected.prompts()[:2], GenerationSettings(max_new_tokens=6)
    result = generate(model, prompts, settings)
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens[:2, :6])

    programs = programs_of(model, prompts)  # those that have just run
    cache = programs.prefill.output_shardings[0].cache
    assert {sharding.spec for sharding in jax.tree.leaves(cache.segments)} == {
        PartitionSpec(None, "data", None, "expert")
    }
    # Rows of two tokens, from at most four ranks.
    assert 0 < max(elements_moved(programs.decode)) <= 4 * 2 * model.decoder.hidden_size


@pytest.mark.slow
def test_a_repetition_penalty_on_a_mesh_gives_the_tokens_of_one_device_and_moves_only_tokens(model):
    prompts = QWEN.expected().prompts()[:2]
    settings = GenerationSettings(max_new_tokens=6, repetition_penalty=1.5)
    on_mesh, alone = (generate(each, prompts, settings).tokens for each in (model, golden_model(QWEN)))
    np.testing.assert_array_equal(on_mesh, alone)
    unpenalized = generate(model, prompts, GenerationSettings(max_new_tokens=6)).tokens
    assert (on_mesh != unpenalized).any()
    programs = programs_of(model, prompts, penalizes_repetition=True)  # those that have just run
    assert 0 < max(elements_moved(programs.decode)) <= 4 * 2 * model.decoder.hidden_size


def test_fewer_key_value_heads_than_ranks_are_not_gathered():
    """Query heads are split further than the keys and values of the cache, which every rank holds whole."""
    model = load(QWEN, {"data": 2, "expert": 4})
    assert {layer.attention.num_kv_heads for layer in model.decoder.layers} == {2}
    programs = programs_of(model, QWEN.expected().prompts()[:2])
    cache = programs.prefill.output_shardings[0].cache
    assert {sharding.spec for sharding in jax.tree.leaves(cache.segments)} == {PartitionSpec(None, "data")}
    assert 0 < max(elements_moved(programs.decode)) <= 4 * 2 * model.decoder.hidden_size


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_the_mesh(model):
    prompts = QWEN.expected().prompts()[:2]
    settings = GenerationSettings(max_new_tokens=6, do_sample=True, temperature=0.5)
    on_mesh, alone = (generate(each, prompts, settings, seed=5).tokens for each in (model, golden_model(QWEN)))
    np.testing.assert_array_equal(on_mesh, alone)


def test_a_model_on_a_mesh_is_saved_as_it_is(model, tmp_path):
    save_pretrained(model, tmp_path / "saved")
    saved, original = open_checkpoint(tmp_path / "saved"), open_checkpoint(QWEN.folder("fused"))
    for path in original.shapes:
        np.testing.assert_array_equal(saved.read(path), original.read(path), err_msg=path)


@pytest.mark.parametrize("sizes", [{}, ALL_AXES], ids=str)
@pytest.mark.parametrize("case", [QWEN, LATENT, SINKS], ids=str)
def test_logits_do_not_change_when_attention_goes_through_blocks_of_queries(case, sizes, monkeypatch):
    monkeypatch.setattr(softmax_attention, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(softmax_attention, "FEWEST_QUERIES", 5)
    model, expected = load(case, sizes) if sizes else golden_model(case), case.expected()
    assert relative_error(logits_of(model, expected.input_ids), expected.logits) < TOLERANCE
