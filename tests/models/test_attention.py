"""Attention with sinks, grouped heads and unequal widths, and both ways of computing latent attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import QUICK_TO_COMPILE

from moe_jax.families.decoder import LatentAttention, Rope
from moe_jax.models import latent_attention
from moe_jax.models.attention import AttentionInputs, attend
from moe_jax.models.latent_attention import MultiHeadLatentAttention, latent_space_is_cheaper
from moe_jax.models.rotary import rotation


def attend_by_definition(query, key, value, mask, scale, sinks):
    """float64, one head at a time; `sinks` [N] are extra logits whose probability is thrown away."""
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    outputs = []
    for head in range(heads):
        logits = np.einsum("bsd,btd->bst", query[:, :, head], key[:, :, head // group]) * scale
        logits = np.where(mask[:, 0], logits, -np.inf)
        sink = np.full((*logits.shape[:2], 1), -np.inf if sinks is None else sinks[head])
        weights = np.exp(np.concatenate([logits, sink], -1) - logits.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
        outputs.append(np.einsum("bst,btv->bsv", weights, value[:, :, head // group]))
    return np.stack(outputs, axis=2)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_width", [4, 6, 9])
def test_attention_is_a_softmax_over_visible_keys_and_the_sink(with_sinks, value_width, rng):
    query, key = rng.normal(size=(2, 5, 6, 6)), rng.normal(size=(2, 7, 3, 6))
    value = rng.normal(size=(2, 7, 3, value_width))
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    sinks = rng.normal(size=6) * 3 if with_sinks else None
    as_jax = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    actual = attend(as_jax(query), as_jax(key), as_jax(value), jnp.asarray(mask), scale=0.7, sinks=as_jax(sinks))
    np.testing.assert_allclose(actual, attend_by_definition(query, key, value, mask, 0.7, sinks), atol=5e-6)


def test_a_token_that_sees_nothing_gets_numbers_not_nan(rng):
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32)
    for sinks in (None, jnp.zeros(2)):
        assert np.isfinite(attend(x, x, x, jnp.zeros((1, 1, 3, 3), bool), scale=1.0, sinks=sinks)).all()


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
        inputs = AttentionInputs(
            rotations={description.rope: rotation(description.rope, jnp.arange(4)[None])},
            masks={None: jnp.tril(jnp.ones((4, 4), bool))[None, None]},
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
