"""Greedy generation with real checkpoints gives the tokens that `transformers` gave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden_cases import golden_case, golden_cases

from moe_jax import from_pretrained
from moe_jax.generation import GenerationSettings, generate

FAMILIES = sorted({case.family for case in golden_cases()})
CASES = [
    pytest.param(case, id=str(case), marks=() if number == 0 else pytest.mark.slow)
    for family in FAMILIES
    for number, case in enumerate(golden_cases(family))
]
"""One case of each family always; the others, whose compilation takes most of the time, with the slow tests."""


@functools.cache
def load(case):
    """The case's model in float32; the form does not matter here."""
    return from_pretrained(case.folder(case.forms[0]), dtype=jnp.float32)


def greedy_settings(expected):
    return GenerationSettings(max_new_tokens=expected.greedy_tokens.shape[1])


@pytest.mark.parametrize("case", CASES)
def test_a_ragged_batch_continues_as_each_prompt_alone_in_transformers(case):
    expected = case.expected()
    result = generate(load(case), [prompt.tolist() for prompt in expected.prompts()], greedy_settings(expected))
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_padded_prompts_continue_as_without_padding(case, side):
    expected = case.expected()
    ids, mask = getattr(expected, f"{side}_input_ids"), getattr(expected, f"{side}_attention_mask")
    result = generate(load(case), ids, greedy_settings(expected), attention_mask=mask)
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens)


@pytest.mark.parametrize("case", golden_cases("qwen3_moe")[:1], ids=str)
def test_streaming_and_counting_load_do_not_change_the_tokens(case):
    expected = case.expected()
    model, prompts = load(case), expected.prompts()
    seen = [[] for _ in prompts]
    result = generate(
        model,
        prompts,
        greedy_settings(expected),
        on_token=lambda row, token: seen[row].append(token),
        with_expert_load=True,
    )
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens)
    np.testing.assert_array_equal(seen, expected.greedy_tokens)
    moe_layers = [model.decoder.layers[layer].feed_forward for layer in model.decoder.moe_layers]
    tokens_read = sum(map(len, prompts)) + result.tokens.size - len(prompts)
    np.testing.assert_array_equal(result.expert_load.sum(axis=1), [tokens_read * moe.top_k for moe in moe_layers])


@pytest.mark.parametrize("case", golden_cases("qwen3_moe")[:1], ids=str)
def test_the_load_of_a_prompt_counts_the_experts_that_transformers_chose(case):
    expected = case.expected()
    settings = GenerationSettings(max_new_tokens=1)  # nothing but the prompts is read
    result = generate(load(case), expected.input_ids, settings, with_expert_load=True)
    num_experts = result.expert_load.shape[1]
    counted = [np.bincount(layer.ravel(), minlength=num_experts) for layer in expected.topk_ids]
    np.testing.assert_array_equal(result.expert_load, counted)


def test_a_model_spread_over_devices_generates_the_same():
    case = golden_case("mixtral", "full_tied")  # 12 experts
    expected = case.expected()
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((3,), ("expert",), axis_types=(auto,), devices=jax.devices()[:3])
    model = from_pretrained(case.folder("fused"), dtype=jnp.float32, mesh=mesh)
    seen = []
    result = generate(
        model, expected.prompts()[:1], greedy_settings(expected), on_token=lambda row, token: seen.append(token)
    )
    np.testing.assert_array_equal(result.tokens, expected.greedy_tokens[:1])
    assert seen == expected.greedy_tokens[0].tolist()
