"""Both ways of computing latent attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.golden_models import QUICK_TO_COMPILE

from moe_jax.families.decoder import LatentAttention, Rope
from moe_jax.models import latent_attention
from moe_jax.models.attention import AttentionInputs
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


def test_decoding_stays_in_the_latents_space_and_long_prompts_are_expanded():
    deepseek_v3 = dataclasses.replace(
        LATENT, num_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert latent_space_is_cheaper(deepseek_v3, queries=1, keys=4096)
    assert not latent_space_is_cheaper(deepseek_v3, queries=4096, keys=4096)
