"""Work is counted as numpy counts it from a list of every product's sizes; bytes are those of real arrays on real devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from support.compiled_programs import GROUPED_QUERY, LATENT, decoder_of

from moe_jax.aot.model_programs import abstract_model
from moe_jax.aot.work import Step, cache_per_device, model_flops, parameters_per_device, work_per_device
from moe_jax.models.parameter_sources import parameter_shardings
from moe_jax.parallel import parallel_of


def grouped_query_products(step):
    """(rows, inner, columns) of every product, experts being equally likely."""
    tokens, c = step.tokens, GROUPED_QUERY
    hidden, heads, width = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    for layer in range(c["num_hidden_layers"]):
        yield from [(tokens, hidden, heads * width)] * 3
        yield tokens, heads * width, hidden
        yield from [(step.batch_size * step.new_tokens * heads, width, step.cache_length)] * 2
        if layer in c["mlp_only_layers"]:
            yield from [(tokens, hidden, c["intermediate_size"])] * 3
        else:
            yield tokens, hidden, c["num_experts"]
            yield from [(tokens * c["num_experts_per_tok"], hidden, c["moe_intermediate_size"])] * 3
    yield step.batch_size, hidden, c["vocab_size"]


def latent_products(step, *, in_latent_space):
    """As `grouped_query_products`."""
    tokens, c = step.tokens, LATENT
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    plain, rotated, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    slots = step.batch_size * step.cache_length
    for layer in range(c["num_hidden_layers"]):
        yield tokens, hidden, c["q_lora_rank"]
        yield tokens, c["q_lora_rank"], heads * (plain + rotated)
        yield tokens, hidden, rank + rotated
        yield tokens, heads * value, hidden
        if in_latent_space:  # queries are taken to the latents, their result from there
            yield from [(tokens * heads, plain, rank), (tokens * heads, rank, value)]
            yield from [(tokens * heads, rank + rotated, step.cache_length)] * 2
        else:  # latents become keys and values
            yield slots, rank, heads * (plain + value)
            yield from [(tokens * heads, plain + rotated, step.cache_length)] * 2
        if layer < c["first_k_dense_replace"]:
            yield from [(tokens, hidden, c["intermediate_size"])] * 3
        else:
            yield tokens, hidden, c["n_routed_experts"]
            chosen = tokens * c["num_experts_per_tok"]
            yield from [(chosen, hidden, c["moe_intermediate_size"])] * 3
            yield from [(tokens, hidden, c["n_shared_experts"] * c["moe_intermediate_size"])] * 3
    yield step.batch_size, hidden, c["vocab_size"]


@functools.cache
def whole_model(name):
    config = {"grouped query": GROUPED_QUERY, "latent": LATENT}[name]
    return abstract_model(decoder_of(config), dtype=jnp.bfloat16)


def flops(products):
    return 2 * sum(int(np.prod(sizes)) for sizes in products)


PREFILL = Step(batch_size=3, new_tokens=17, cache_length=32)
DECODE = Step(batch_size=3, new_tokens=1, cache_length=32)


@pytest.mark.parametrize("step", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_products_of_grouped_query_attention_and_experts_are_all_counted(step):
    model = whole_model("grouped query")
    expected = flops(grouped_query_products(step))
    assert model_flops(model, step) == pytest.approx(expected)
    assert work_per_device(model, step).flops == pytest.approx(expected)


@pytest.mark.parametrize(("step", "in_latent_space"), [(PREFILL, False), (DECODE, True)], ids=["prefill", "decode"])
def test_products_of_latent_attention_and_shared_experts_are_all_counted(step, in_latent_space):
    model = whole_model("latent")
    assert model_flops(model, step) == pytest.approx(flops(latent_products(step, in_latent_space=in_latent_space)))


def mesh_of(data, expert, tensor):
    devices = jax.devices()[: data * expert * tensor]
    types = (AxisType.Auto,) * 3
    return jax.make_mesh((data, expert, tensor), ("data", "expert", "tensor"), axis_types=types, devices=devices)


def split_model(config, mesh, dtype=jnp.bfloat16):
    return abstract_model(decoder_of(config), dtype=dtype, mesh=mesh, parallel=parallel_of(mesh))


def test_devices_share_what_is_split_and_repeat_what_is_whole():
    step = Step(batch_size=4, new_tokens=8, cache_length=16)
    model = split_model(GROUPED_QUERY, mesh_of(2, 2, 2))
    router = 2 * step.tokens * 32 * 16 * 4  # of four sparse layers, computed by the four ranks of each data position
    whole = flops(grouped_query_products(step))
    assert work_per_device(model, step).flops == pytest.approx((whole - router) / 8 + router / 2)
    assert model_flops(model, step) == pytest.approx(whole)


@pytest.mark.parametrize("config", [GROUPED_QUERY, LATENT], ids=["grouped query", "latent"])
def test_bytes_held_by_a_device_are_those_of_the_real_arrays(config):
    model = split_model(config, mesh_of(2, 2, 2))
    shapes, shardings = nnx.to_flat_state(nnx.state(model)), parameter_shardings(model)
    parameters = [jax.device_put(np.zeros(one.shape, one.dtype), shardings[path]) for path, one in shapes]
    cache = model.init_cache(4, 16)

    def on_first_device(tree):
        shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    assert parameters_per_device(model) == on_first_device(parameters)
    assert cache_per_device(model, batch_size=4, cache_length=16) == on_first_device(cache.segments)


def test_few_tokens_read_few_experts_and_many_read_all():
    model = whole_model("grouped query")
    held = parameters_per_device(model)
    experts = 4 * 16 * 3 * 24 * 32 * 2  # sparse layers, experts, matrices, sizes, bytes
    table, width = 40 * 32 * 2, 32 * 2  # of the embedding only the tokens' rows are read
    for tokens in (1, 5, 4000):
        untouched = (1 - 3 / 16) ** tokens
        expected = held - table + tokens * width - untouched * experts
        step = Step(batch_size=tokens, new_tokens=1, cache_length=16)
        assert work_per_device(model, step).weight_bytes == pytest.approx(expected)


def test_decode_reads_the_whole_cache_and_writes_a_token():
    model = whole_model("latent")
    per_token = 5 * (12 + 4) * 2
    assert work_per_device(model, DECODE).cache_bytes == pytest.approx(3 * per_token * (32 + 1))


def test_no_array_is_made_for_an_abstract_model():
    model = whole_model("latent")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
