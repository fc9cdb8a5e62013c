"""Both ways of computing latent attention."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.golden_models import QUICK_TO_COMPILE

from moe_jax.families.decoder import LatentAttention, Rope
from moe_jax.models import latent_attention
from moe_jax.models.attention import AttentionInputs
from moe_jax.models.cache import LayerCache
from moe_jax.models.latent_attention import MultiHeadLatentAttention, latent_space_is_cheaper
from moe_jax.models.rotary import rotation
from moe_jax.models.sequence import Visibility

LATENT = LatentAttention(
    num_heads=3,
    q_lora_rank=5,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=7,
    rope=Rope(theta=100.0, rotary_dim=2, interleaved=True),
    scale=0.3,
    bias=True,
)


@pytest.mark.parametrize("q_lora_rank", [5, None])
def test_latent_attention_is_the_same_in_the_latents_space_and_expanded(q_lora_rank, rng, monkeypatch):
    description = dataclasses.replace(LATENT, q_lora_rank=q_lora_rank)
    dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}

    def compute_both_ways(x):
        module = MultiHeadLatentAttention(description, hidden_size=8, **dtypes, rngs=nnx.Rngs(0))
        places = jnp.broadcast_to(jnp.arange(4), (2, 4))
        inputs = AttentionInputs(
            rotations={description.rope: rotation(description.rope, jnp.arange(4)[None])},
            visibility={None: Visibility(places, places[:1], None)},
            slots=jnp.zeros((2, 4), jnp.int32),
        )
        for cheaper in (True, False):
            monkeypatch.setattr(latent_attention, "latent_space_is_cheaper", lambda *_, c=cheaper, **__: c)
            yield module(x, inputs, None)[0]

    x = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    outputs = jax.jit(lambda x: list(compute_both_ways(x)), compiler_options=QUICK_TO_COMPILE)(x)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-5)
    assert np.std(outputs[0]) > 1e-3


DEEPSEEK_V3 = dataclasses.replace(
    LATENT, num_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)


def multiplications(description, queries, keys):
    """Of one head, product after product: expanded, and in the latents' space."""
    rank, rope = description.kv_lora_rank, description.qk_rope_head_dim
    unrotated, value = description.qk_nope_head_dim, description.v_head_dim
    expanded = [(keys, rank, unrotated + value), (queries, unrotated + rope, keys), (queries, keys, value)]
    taken, back = (queries, unrotated, rank), (queries, rank, value)
    in_latent_space = [taken, (queries, rank + rope, keys), (queries, keys, rank + rope), back]
    return sum(map(math.prod, expanded)), sum(map(math.prod, in_latent_space))


@pytest.mark.parametrize(("description", "keys"), [(LATENT, 50), (DEEPSEEK_V3, 300), (DEEPSEEK_V3, 4096)])
def test_queries_are_taken_into_the_latents_space_if_that_is_fewer_multiplications(description, keys):
    """Which it is for one query, and is not for as many as there are keys."""
    expected = []
    for queries in range(1, keys + 1):
        expanded, in_latent_space = multiplications(description, queries, keys)
        expected.append(in_latent_space < expanded)
        assert latent_space_is_cheaper(description, queries=queries, keys=keys) == expected[-1], queries
    assert (expected[0], expected[-1]) == (True, False)


@pytest.mark.parametrize(("batch", "queries", "expanded"), [(40, 1, False), (1, 40, True)])
def test_what_counts_is_the_number_of_queries_of_a_row_and_of_slots_in_the_cache(batch, queries, expanded):
    def attend(x, latents):
        module = MultiHeadLatentAttention(
            LATENT, hidden_size=8, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        places = jnp.broadcast_to(jnp.arange(queries), (batch, queries))
        inputs = AttentionInputs(
            rotations={LATENT.rope: rotation(LATENT.rope, places)},
            visibility={None: Visibility(places, jnp.arange(50)[None], None)},
            slots=places,
        )
        return module(x, inputs, LayerCache((latents,), jnp.array(0)))[0]

    x, latents = jnp.zeros((batch, queries, 8)), jnp.zeros((1, batch, 50, 8))
    program = str(jax.make_jaxpr(attend)(x, latents))
    keys_and_values = f"f32[{batch},50,{3 * (4 + 7)}]"
    assert (keys_and_values in program) == expanded
