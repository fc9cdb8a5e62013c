"""Logits and chosen experts are those of Hugging Face `transformers`, for every family, form and side of padding."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support import golden_cases
from support.golden_models import TOLERANCE, compiled, golden_model, relative_error

from moe_jax import from_pretrained

CASES = golden_cases.golden_cases()
UNQUANTIZED = [(case, form) for case, form in golden_cases.cases_and_forms() if form in ("per_expert", "fused")]
QUANTIZED = [(case, form) for case, form in golden_cases.cases_and_forms() if form not in ("per_expert", "fused")]


def forward(model, input_ids, attention_mask):
    return model(input_ids, attention_mask=attention_mask, with_aux=True)


def run_all_prompts(case, model):
    """One batch of everything: the prompts without padding, the left-padded and the right-padded ones.

    Those that are shorter than others are padded on the right with arbitrary tokens.

    Returns:
        Logits of the three, cut to their own lengths; the aux; the mask of the whole batch.
    """
    expected = case.expected()
    ids = (expected.input_ids, expected.left_input_ids, expected.right_input_ids)
    masks = (np.ones_like(ids[0]), expected.left_attention_mask, expected.right_attention_mask)
    longest = max(array.shape[1] for array in ids)

    def batch(arrays, fill):
        padded = [np.pad(a, [(0, 0), (0, longest - a.shape[1])], constant_values=fill) for a in arrays]
        return jnp.asarray(np.concatenate(padded))

    mask = batch(masks, 0)
    logits, aux = compiled(case, forward)(model, batch(ids, 5), mask)
    parts = np.split(np.asarray(logits), np.cumsum([len(array) for array in ids])[:-1])
    return *(part[:, : a.shape[1]] for part, a in zip(parts, ids, strict=True)), aux, np.asarray(mask)


@pytest.mark.parametrize(("case", "form"), UNQUANTIZED, ids=str)
def test_logits_and_experts_are_those_of_transformers(case, form):
    expected = case.expected()
    plain, left, right, aux, mask = run_all_prompts(case, golden_model(case, form))

    assert relative_error(plain, expected.logits) < TOLERANCE
    assert relative_error(left, expected.left_logits, expected.left_attention_mask == 1) < TOLERANCE
    assert relative_error(right, expected.right_logits, expected.right_attention_mask == 1) < TOLERANCE

    batch, length = expected.input_ids.shape
    np.testing.assert_array_equal(np.sort(aux.topk_ids[:, :batch, :length], axis=-1), expected.topk_ids)
    assert (np.asarray(aux.topk_ids)[:, mask == 0] == -1).all()
    counts = [np.bincount(layer[mask == 1].ravel(), minlength=aux.expert_load.shape[1]) for layer in aux.topk_ids]
    np.testing.assert_array_equal(aux.expert_load, counts)


@pytest.mark.parametrize(("case", "form"), QUANTIZED, ids=str)
def test_a_quantized_form_holds_nearly_the_same_model(case, form):
    """Its logits differ by the rounding of the weights, which may also tip a choice of experts; more would be a misread."""
    expected = case.expected()
    plain, *_ = run_all_prompts(case, golden_model(case, form))
    differences = np.abs(plain - expected.logits) / expected.logits.std()
    assert np.median(differences) < 0.2


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("sliding", "yarn")], ids=str)
def test_without_a_mask_every_token_is_real(case):
    expected = case.expected()
    logits = compiled(case, lambda model, ids: model(ids))(golden_model(case), jnp.asarray(expected.input_ids))
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected.logits) < TOLERANCE


def test_a_checkpoint_with_a_config_in_the_published_spelling_is_the_same_model(tmp_path):
    case = golden_cases.golden_case("qwen3_moe", "raw_probabilities")
    model = from_pretrained(case.write_hub_style_folder("fused", tmp_path / "hub"), dtype=np.float32)
    original = golden_model(case, "fused")
    assert model.decoder == original.decoder
    plain, *_ = run_all_prompts(case, model)
    assert relative_error(plain, case.expected().logits) < TOLERANCE


def test_forced_experts_are_used_and_captured_ones_replay_the_forward_pass(rng):
    case = golden_cases.golden_case("qwen3_moe", "renormalized")
    model, expected = golden_model(case), case.expected()

    def replay(model, ids, forced):
        return model(ids, forced_ids=forced, with_aux=True)

    run = compiled(case, replay)
    captured = jnp.asarray(expected.topk_ids)
    logits, aux = run(model, jnp.asarray(expected.input_ids), captured)
    assert relative_error(logits, expected.logits) < TOLERANCE
    np.testing.assert_array_equal(aux.topk_ids, captured)

    other = rng.permuted(np.tile(np.arange(9), (*captured.shape[:-1], 1)), axis=-1)[..., :3]
    changed, aux = run(model, jnp.asarray(expected.input_ids), jnp.asarray(other))
    np.testing.assert_array_equal(aux.topk_ids, other)
    assert relative_error(changed, expected.logits) > 0.1


def test_aux_is_a_pytree_of_arrays_with_a_leading_axis_of_layers():
    case = golden_cases.golden_case("qwen3_moe", "renormalized")
    *_, aux, mask = run_all_prompts(case, golden_model(case))
    num_layers = len(golden_model(case).decoder.moe_layers)
    for field in dataclasses.fields(aux):
        assert getattr(aux, field.name).shape[0] == num_layers
    assert aux.router_logits.shape == (num_layers, *mask.shape, 9)
