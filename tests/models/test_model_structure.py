"""What a model is made of: its parameters, and how little of it is compiled whatever its depth."""

import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.golden_models import QUICK_TO_COMPILE
from support.published_configs import CONFIGS
from support.small_models import small_decoder

from moe_jax.config import ParallelConfig, RouterConfig
from moe_jax.families import FAMILIES, get_family, parameter_shapes
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import parameter_sources
from moe_jax.runner import MoERunner

SMALL = {"hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL_EXPERTS = {"intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}


def abstract_model(config, **options):
    decoder = get_family(config).build_decoder(config)
    return nnx.eval_shape(lambda: CausalLM(decoder, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_parameters_of_a_model_are_those_of_the_parameter_table(model_type):
    """At published sizes: nothing is allocated."""
    model = abstract_model(CONFIGS[model_type], param_dtype=jnp.bfloat16)
    sources, shapes = parameter_sources(model), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        source = sources[path]
        if isinstance(source, str):
            shapes[source] = variable.shape
        else:
            assert variable.shape[0] == len(source)
            shapes |= dict.fromkeys(source, variable.shape[1:])
        expected = jnp.float32 if path[-1] == "correction_bias" else jnp.bfloat16
        assert variable.dtype == expected, path
    assert shapes == parameter_shapes(model.decoder)


def qwen3(num_layers):
    return {**CONFIGS["qwen3_moe"], **SMALL, **SMALL_EXPERTS, "head_dim": 8, "num_hidden_layers": num_layers}


def gpt_oss(num_layers):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    layers = {"num_hidden_layers": num_layers, "layer_types": None}
    return {**CONFIGS["gpt_oss"], **SMALL, **experts, "head_dim": 8, **layers}


@pytest.mark.parametrize("family", [qwen3, gpt_oss])
def test_a_deep_model_is_no_larger_a_program_than_a_shallow_one(family):
    """What is compiled for 48 layers has the size of what is compiled for 4, cached decoding included."""

    def program_size(num_layers):
        model = abstract_model(family(num_layers))
        graph, state = nnx.split(model)
        cache = jax.eval_shape(lambda: model.init_cache(2, 16))
        ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        decode = jax.jit(lambda state, cache, ids: nnx.merge(graph, state)(ids, cache=cache, with_aux=True))
        return len(decode.lower(state, cache, ids).as_text().splitlines())

    assert program_size(48) <= 1.02 * program_size(4)


def test_a_decoding_step_updates_the_cache_in_place():
    """The memory beside arguments and results doesn't hold a second copy of any layer's cache."""
    model = abstract_model(qwen3(3))
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: model.init_cache(2, 4096))
    decode = jax.jit(
        lambda state, cache, ids: nnx.merge(graph, state)(ids, cache=cache),
        donate_argnums=1,
        compiler_options=QUICK_TO_COMPILE,
    )
    memory = decode.lower(state, cache, jax.ShapeDtypeStruct((2, 1), jnp.int32)).compile().memory_analysis()
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.segments))
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes < nbytes


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_model_computes_in_its_dtype_whatever_that_of_its_parameters(model_type, param_dtype):
    """Layers add to what they are given, so that a part of one in a wider dtype would make everything that wide."""
    config = {**CONFIGS[model_type], "num_hidden_layers": 2, "layer_types": None}
    model = abstract_model(config, dtype=jnp.bfloat16, param_dtype=param_dtype)
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)

    def run(model, ids):
        embedded = model.embedder(ids)
        return embedded, *model.hidden_states(ids, cache=model.init_cache(2, 8))[:2]

    embedded, hidden, cache = nnx.eval_shape(run, model, ids)
    assert {x.dtype for x in (embedded, hidden, *jax.tree.leaves(cache.segments))} == {jnp.dtype(jnp.bfloat16)}


def test_programs_of_a_model_do_not_depend_on_how_its_dtype_was_spelled():
    spellings = ("bfloat16", jnp.bfloat16, jnp.dtype(jnp.bfloat16))
    assert len({nnx.graphdef(abstract_model(qwen3(2), dtype=spelling)) for spelling in spellings}) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_float32_sums_of_products_in_the_dtype_of_the_computation(tied, rng):
    decoder = small_decoder(num_hidden_layers=1, tie_word_embeddings=tied)
    model = CausalLM(decoder, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert (model.lm_head is None) == tied
    hidden = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.bfloat16)
    table = model.embedder.embedding[...].T if tied else model.lm_head.kernel[...]
    assert table.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(table.astype(jnp.bfloat16), np.float64)
    logits = model.logits(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_a_cache_may_be_narrower_than_the_computation(model_type):
    model = abstract_model({**CONFIGS[model_type], "num_hidden_layers": 2, "layer_types": None})
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)

    def run(model, ids):
        return model.hidden_states(ids, cache=model.init_cache(2, 8, dtype=jnp.bfloat16))

    hidden, cache, _ = nnx.eval_shape(run, model, ids)
    assert hidden.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.segments)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3"])
def test_every_norm_has_the_epsilon_of_the_config_but_those_of_latents(model_type):
    """Which is too small to be seen in results, as hidden states usually are."""
    given = {"glm4_moe": {"use_qk_norm": True}}.get(model_type, {})
    model = abstract_model({**CONFIGS[model_type], **given, "rms_norm_eps": 0.25})
    norms = {path: node.epsilon for path, node in nnx.iter_graph(model) if isinstance(node, nnx.RMSNorm)}
    of_latents = {path for path in norms if path[-1] in ("q_a_norm", "kv_a_norm")}
    assert bool(of_latents) == (model_type == "deepseek_v3")
    assert norms == {path: 1e-6 if path in of_latents else 0.25 for path in norms}
    assert len(norms) == 1 + 4 * sum(len(stack.blocks) for stack in model.stacks)


def test_options_reach_every_layer():
    options = {"implementation": "xla", "num_redundant_experts": 2, "fuse_shared_experts": True, "dtype": jnp.bfloat16}
    model = abstract_model(CONFIGS["deepseek_v3"], param_dtype=jnp.float16, **options)
    mixtures = [node for _, node in nnx.iter_graph(model) if isinstance(node, MoERunner)]
    assert len(mixtures) == 1  # for all layers
    for name, value in {**options, "param_dtype": jnp.float16}.items():
        assert getattr(mixtures[0].config, name) == value


def test_results_come_as_logits_then_cache_then_aux():
    model = abstract_model(qwen3(2))
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)

    def shapes(with_cache, with_aux):
        def run(model, ids):
            return model(ids, cache=model.init_cache(2, 8) if with_cache else None, with_aux=with_aux)

        return nnx.eval_shape(run, model, ids)

    assert shapes(False, False).shape == (2, 3, 64)
    logits, cache = shapes(True, False)
    assert (logits.shape, cache.max_length) == ((2, 3, 64), 8)
    logits, aux = shapes(False, True)
    assert (logits.shape, aux.expert_load.shape) == ((2, 3, 64), (2, 4))
    logits, cache, aux = shapes(True, True)
    assert (cache.max_length, aux.topk_ids.shape) == (8, (2, 2, 3, 2))
    assert nnx.eval_shape(lambda model, ids: model.hidden_states(ids), model, ids)[1:] == (None, None)


def test_a_model_remembers_its_config_json_and_its_folder():
    config = types.MappingProxyType(qwen3(2))
    model = abstract_model(qwen3(2), hf_config=config, source_folder=pathlib.Path("somewhere"))
    assert (model.hf_config, model.source_folder) == (qwen3(2), "somewhere")
    assert abstract_model(qwen3(2)).hf_config is None


def test_parallel_axes_need_a_mesh():
    with pytest.raises(ValueError, match="mesh"):
        abstract_model(qwen3(2), parallel=ParallelConfig(expert_axis="expert"))


@pytest.mark.parametrize("shape", [(3, 2, 3, 2), (2, 3, 2, 2), (2, 2, 4, 2)])
def test_forced_experts_must_be_given_for_every_moe_layer_and_token(shape):
    model = abstract_model(qwen3(2))
    ids, forced = jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.int32)
    with pytest.raises(ValueError, match=r"\(2 MoE layers, \*\(2, 3\) of input_ids.*got " + re.escape(str(shape))):
        nnx.eval_shape(lambda model, ids, forced: model(ids, forced_ids=forced), model, ids, forced)


@pytest.mark.parametrize(
    ("router", "needed"),
    [
        (RouterConfig(hash_vocab_size=16), "router.hash_vocab_size=16 needs the tokens' ids"),
        (RouterConfig(simulation="uniform_random"), "router.simulation='uniform_random' needs a key"),
    ],
)
def test_routers_that_layers_of_a_model_could_not_feed_are_refused_when_it_is_built(router, needed):
    decoder = small_decoder(num_hidden_layers=2)
    layers = [
        dataclasses.replace(layer, feed_forward=dataclasses.replace(layer.feed_forward, router=router))
        for layer in decoder.layers
    ]
    decoder = dataclasses.replace(decoder, layers=tuple(layers))
    with pytest.raises(NotImplementedError, match=re.escape(needed)):
        nnx.eval_shape(lambda: CausalLM(decoder, rngs=nnx.Rngs(0)))
