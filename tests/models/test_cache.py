"""With a key/value cache, any way of feeding the tokens gives the logits of the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import golden_cases
from support.golden_models import TOLERANCE, compiled, golden_model, relative_error
from support.small_models import small_decoder

from moe_jax.models import CausalLM
from moe_jax.models.cache import KVCache

CASES = golden_cases.golden_cases()


def feed(width):
    """A function that feeds a batch to a cache in chunks of `width` tokens and returns all logits and the cache."""

    def run(model, input_ids, attention_mask):
        batch, length = input_ids.shape
        cache = model.init_cache(batch, max_length=length)
        graph, state = nnx.split(model)

        def step(cache, chunk):
            ids, mask = chunk
            logits, cache = nnx.merge(graph, state)(ids, attention_mask=mask, cache=cache)
            return cache, logits

        def chunks(array):
            return jnp.moveaxis(array.reshape(batch, length // width, width), 1, 0)

        cache, logits = jax.lax.scan(step, cache, (chunks(input_ids), chunks(attention_mask)))
        return jnp.moveaxis(logits, 0, 1).reshape(batch, length, -1), cache

    return run


ONE_BY_ONE, IN_CHUNKS = feed(1), feed(8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_fed_one_by_one_give_the_logits_of_the_full_pass(case):
    """Ragged prompts with padding on the left, longer than every sliding window."""
    expected = case.expected()
    mask = expected.left_attention_mask
    logits, cache = compiled(case, ONE_BY_ONE)(golden_model(case), expected.left_input_ids, mask)
    assert relative_error(logits, expected.left_logits, mask == 1) < TOLERANCE
    np.testing.assert_array_equal(cache.lengths, expected.lengths)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_chunks_may_hold_padding_on_either_side(family, side):
    case = golden_cases.golden_cases(family)[-1]
    expected = case.expected()
    ids, mask = getattr(expected, f"{side}_input_ids"), getattr(expected, f"{side}_attention_mask")
    missing = -ids.shape[1] % 8
    widths = [(0, 0), (missing, 0) if side == "left" else (0, missing)]
    padded_mask = np.pad(mask, widths)
    logits, cache = compiled(case, IN_CHUNKS)(golden_model(case), np.pad(ids, widths), padded_mask)
    real = np.asarray(logits)[padded_mask == 1]
    assert relative_error(real, getattr(expected, f"{side}_logits")[mask == 1]) < TOLERANCE
    np.testing.assert_array_equal(cache.lengths, expected.lengths)


@pytest.fixture(scope="module")
def small_model():
    return CausalLM(small_decoder(num_hidden_layers=2), rngs=nnx.Rngs(0))


def test_tokens_without_a_mask_are_counted_on_from_those_in_the_cache(small_model, rng):
    """All rows full, as between turns of a conversation; positions and visible keys are those of the full pass."""
    ids = jnp.asarray(rng.integers(0, 16, (2, 7)))
    expected, cache, got = small_model(ids), small_model.init_cache(2, max_length=7), []
    for chunk in jnp.split(ids, [3, 6], axis=1):
        logits, cache = small_model(chunk, cache=cache)
        got.append(logits)
    assert relative_error(np.concatenate(got, axis=1), np.asarray(expected)) < 1e-5
    np.testing.assert_array_equal(cache.lengths, [7, 7])


def test_padding_does_not_touch_a_row_that_fills_its_cache(small_model, rng):
    ids, mask = jnp.asarray(rng.integers(0, 16, (2, 4))), jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    _, full = small_model(ids, attention_mask=mask, cache=small_model.init_cache(2, max_length=4))
    _, later = small_model(ids[:, :1], attention_mask=jnp.array([[0], [1]]), cache=full)
    np.testing.assert_array_equal(later.lengths, [4, 3])
    for before, after in zip(jax.tree.leaves(full.segments), jax.tree.leaves(later.segments), strict=True):
        np.testing.assert_array_equal(after[:, 0], before[:, 0])
        np.testing.assert_array_equal(after[:, 1, :2], before[:, 1, :2])
        assert np.any(after[:, 1, 2] != before[:, 1, 2])


def test_positions_may_be_given(small_model, rng):
    """Twice the positions with half the frequencies are the same angles."""
    ids = jnp.asarray(rng.integers(0, 16, (2, 7)))
    halved = small_decoder(num_hidden_layers=2, rope_scaling={"rope_type": "linear", "factor": 2.0})
    places = jnp.broadcast_to(2 * jnp.arange(7), (2, 7))
    expected, given = np.asarray(small_model(ids)), np.asarray(small_model(ids, positions=places))
    assert relative_error(np.asarray(CausalLM(halved, rngs=nnx.Rngs(0))(ids, positions=places)), expected) < 1e-5
    assert relative_error(given, expected) > 1e-3


def test_a_row_that_outgrows_its_cache_says_so_with_nan_and_leaves_the_others_alone():
    case = golden_cases.golden_case("mixtral", "sliding")
    expected = case.expected()

    def run(model, ids, mask):
        return model(ids, attention_mask=mask, cache=model.init_cache(*ids.shape))

    ids, mask = expected.right_input_ids, expected.right_attention_mask
    model, program = golden_model(case), compiled(case, run)
    logits, cache = program(model, ids, mask)
    assert not np.isnan(np.asarray(logits)[mask == 1]).any()

    def run_short(model, ids, mask):
        return model(ids, attention_mask=mask, cache=model.init_cache(ids.shape[0], max_length=ids.shape[1] - 1))

    logits, cache = compiled(case, run_short)(model, ids, mask)
    too_long = expected.lengths > cache.max_length
    assert too_long.any()
    assert not too_long.all()
    assert np.isnan(np.asarray(logits)[too_long]).all()
    assert (
        relative_error(np.asarray(logits)[~too_long], expected.right_logits[~too_long], mask[~too_long] == 1)
        < TOLERANCE
    )


def test_a_cache_that_cannot_hold_the_tokens_of_a_call_is_refused():
    model = golden_model(golden_cases.golden_case("mixtral", "sliding"))
    cache, ids = jax.eval_shape(lambda: model.init_cache(1, 4)), jnp.ones((1, 5), jnp.int32)
    with pytest.raises(ValueError, match="a slot for each of the 5 tokens of a row, got max_length=4"):
        nnx.eval_shape(lambda model, cache: model(ids, cache=cache), model, cache)
    nnx.eval_shape(lambda model, cache: model(ids, attention_mask=ids, cache=cache), model, cache)  # one may be padding
    nnx.eval_shape(lambda model, cache: model(ids[:, :4], cache=cache), model, cache)
    with pytest.raises(ValueError, match="max_length must be positive, got 0"):
        model.init_cache(1, 0)


def test_a_cache_is_a_pytree_whose_sizes_are_known():
    case = golden_cases.golden_case("qwen3_moe", "raw_probabilities")
    cache = golden_model(case).init_cache(3, max_length=11, dtype=jnp.bfloat16)
    assert isinstance(cache, KVCache)
    assert (cache.batch_size, cache.max_length) == (3, 11)
    leaves = jax.tree.leaves(cache.segments)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert sum(leaf.shape[0] for leaf in leaves) == 2 * 4  # keys and values of four layers
    assert {leaf.shape[1:] for leaf in leaves} == {(3, 11, 2, 16)}


def test_latent_attention_caches_only_the_compressed_vector():
    case = golden_cases.golden_cases("deepseek_v2")[0]
    decoder = golden_model(case).decoder
    leaves = jax.tree.leaves(golden_model(case).init_cache(2, max_length=5).segments)
    attention = decoder.layers[0].attention
    assert {leaf.shape[1:] for leaf in leaves} == {(2, 5, attention.kv_lora_rank + attention.qk_rope_head_dim)}
    assert sum(leaf.shape[0] for leaf in leaves) == len(decoder.layers)
