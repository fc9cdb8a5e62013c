"""The generation loop, on a model whose results a few lines of numpy know."""

import dataclasses

import jax
import numpy as np
import pytest
from support.fading_memory_model import (
    FadingMemoryModel,
    expected_greedy,
    expected_load,
    expected_logits,
    expected_penalized,
)

from moe_jax.generation import Generation, GenerationSettings, generate, generate_batches
from moe_jax.generation.programs import bucket, compile_programs, signature_of

VOCAB = 23
SAMPLING = GenerationSettings(max_new_tokens=15, do_sample=True, temperature=1.3, top_k=19, top_p=0.97)
"""One for several tests, because every combination of restrictions is a program of its own."""


@pytest.fixture
def table(rng):
    return rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)


@pytest.fixture
def model(table):
    return FadingMemoryModel(table)


def draw_prompts(rng, *lengths):
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def count_compilations(function):
    """How many programs XLA compiles while `function` runs, and its result."""
    compilations = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compilations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        result = function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compilations), result


def test_greedy_tokens_are_those_of_the_definition_for_prompts_of_any_length(model, table, rng):
    prompts = draw_prompts(rng, 1, 16, 11)
    result = generate(model, prompts, GenerationSettings(max_new_tokens=16))
    for row, prompt in enumerate(prompts):
        assert result.row(row) == expected_greedy(table, prompt, 16)
    assert result.finish_reasons == ("length",) * 3
    assert result.lengths.tolist() == [16] * 3


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_does_not_matter_wherever_it_is(model, table, rng, side):
    prompts = draw_prompts(rng, 3, 9, 7)
    ids, mask = rng.integers(0, VOCAB, (3, 12)), np.zeros((3, 12), int)
    for row, prompt in enumerate(prompts):
        where = {
            "left": np.arange(12)[12 - len(prompt) :],
            "right": np.arange(len(prompt)),
            "scattered": np.sort(rng.permutation(12)[: len(prompt)]),
        }[side]
        ids[row, where], mask[row, where] = prompt, 1
    result = generate(model, ids, GenerationSettings(max_new_tokens=6), attention_mask=mask)
    assert [result.row(row) for row in range(3)] == [expected_greedy(table, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("nonzero", [-1, 2, True, 0.5], ids=str)
def test_a_mask_is_nonzero_at_tokens_whatever_its_numbers(model, table, rng, nonzero):
    (prompt,) = draw_prompts(rng, 5)
    mask = np.array([[0, 0, 1, 1, 1, 1, 1]]) * np.asarray(nonzero)
    result = generate(model, np.array([[3, 3, *prompt]]), GenerationSettings(max_new_tokens=6), attention_mask=mask)
    assert result.row(0) == expected_greedy(table, prompt, 6)


def test_without_settings_128_tokens_are_generated(model, table, rng):
    (prompt,) = draw_prompts(rng, 3)
    assert generate(model, [prompt]).row(0) == expected_greedy(table, prompt, 128)


def test_compiling_does_not_count_as_reading_the_prompts(model, rng, monkeypatch):
    """By a clock that moves only while programs are compiled and when it is looked at."""
    from moe_jax.generation import text_generation

    now = 0.0

    def clock():
        nonlocal now
        now += 1.0
        return now

    def compile_slowly(signature):
        nonlocal now
        now += 1000.0
        return compile_programs(signature)

    monkeypatch.setattr(text_generation.time, "perf_counter", clock)
    monkeypatch.setattr(text_generation, "compile_programs", compile_slowly)
    timing = generate(model, draw_prompts(rng, 3), GenerationSettings(max_new_tokens=4)).timing
    assert timing.compile_seconds > 1000
    assert 0 < timing.prefill_seconds < 100
    assert 0 < timing.decode_seconds < 100


@pytest.mark.parametrize("streamed", [False, True])
def test_each_row_stops_at_its_own_end_and_is_filled_with_padding(model, table, rng, streamed):
    prompts = draw_prompts(rng, 2, 6, 4)
    unlimited = [expected_greedy(table, prompt, 12) for prompt in prompts]
    eos = (unlimited[0][3], unlimited[1][7])  # rows 0 and 1 end by these at the latest
    expected = [expected_greedy(table, prompt, 12, eos) for prompt in prompts]
    seen = [[], [], []]
    settings = GenerationSettings(max_new_tokens=12, eos_token_ids=eos, pad_token_id=VOCAB + 1)
    result = generate(
        model, prompts, settings, on_token=(lambda row, token: seen[row].append(token)) if streamed else None
    )
    assert [result.row(row) for row in range(3)] == expected
    assert result.finish_reasons == tuple("eos" if tokens[-1] in eos else "length" for tokens in expected)
    for row, tokens in enumerate(expected):
        assert (result.tokens[row, len(tokens) :] == VOCAB + 1).all()
    assert result.tokens.shape[1] == max(map(len, expected))
    if streamed:
        assert seen == expected


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("penalty", [1.05, 3.0, 0.6])
def test_a_repetition_penalty_counts_each_rows_prompt_and_new_tokens_and_no_padding(
    model, table, rng, penalty, streamed
):
    prompts = draw_prompts(rng, 3, 16)
    prompts[0] = [token or 1 for token in prompts[0]]  # 0 is what fills the front of the shorter row
    settings = GenerationSettings(max_new_tokens=16, repetition_penalty=penalty)
    result = generate(model, prompts, settings, on_token=(lambda *_: None) if streamed else None)
    for row, prompt in enumerate(prompts):
        assert result.row(row) == expected_penalized(table, prompt, 16, penalty)


def test_the_token_that_pads_is_not_penalized(table):
    table[:, 0] = 50.0  # by far the most likely token, unless it is penalized
    prompts = [[5], list(range(1, 17))]
    result = generate(FadingMemoryModel(table), prompts, GenerationSettings(max_new_tokens=1, repetition_penalty=1e4))
    assert result.tokens.tolist() == [[0], [0]]


def test_a_row_that_ended_changes_nothing_with_a_repetition_penalty(model, table, rng):
    prompts = draw_prompts(rng, 2, 6)
    unlimited = [expected_penalized(table, prompt, 9, 1.5) for prompt in prompts]
    eos = unlimited[0][3]
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in unlimited]
    settings = GenerationSettings(max_new_tokens=9, repetition_penalty=1.5, eos_token_ids=(eos,), pad_token_id=-1)
    result = generate(model, prompts, settings)
    assert [result.row(row) for row in range(2)] == expected


def test_what_is_drawn_with_a_repetition_penalty_follows_the_penalized_distribution(table, rng):
    """The penalty comes before temperature and top-k: only the best three of the penalized logits are drawn."""
    (prompt,) = draw_prompts(rng, 7)
    logits = expected_logits(table, prompt)
    seen = np.isin(np.arange(VOCAB), prompt)
    penalized = np.where(seen, np.where(logits > 0, logits / 2.5, logits * 2.5), logits)
    best = np.argsort(-penalized)[:3]
    probabilities = np.exp(penalized[best] / 1.5)
    probabilities /= probabilities.sum()
    draws = 4096
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, temperature=1.5, top_k=3, repetition_penalty=2.5)
    result = generate(FadingMemoryModel(table), [prompt] * draws, settings, seed=int(rng.integers(2**31)))
    observed = np.bincount(result.tokens[:, 0], minlength=VOCAB)[best]
    assert observed.sum() == draws
    deviation = np.sqrt(draws * probabilities * (1 - probabilities))
    assert (np.abs(observed - draws * probabilities) <= 6 * deviation + 1).all()


def test_a_repetition_penalty_of_1_runs_the_programs_without_one_and_other_values_share_theirs(model, rng):
    prompts = draw_prompts(rng, 3, 5)
    plain = generate(model, prompts, SAMPLING, seed=4)
    neutral = dataclasses.replace(SAMPLING, repetition_penalty=1.0)
    compilations, result = count_compilations(lambda: generate(model, prompts, neutral, seed=4))
    assert compilations == 0
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    generate(model, prompts, dataclasses.replace(SAMPLING, repetition_penalty=1.2), seed=4)
    other = dataclasses.replace(SAMPLING, repetition_penalty=1.3)
    compilations, _ = count_compilations(lambda: generate(model, prompts, other, seed=4))
    assert compilations == 0


def test_batches_compile_once_and_the_last_one_too(model, rng):
    prompts = draw_prompts(rng, *rng.integers(1, 16, size=7))
    settings = dataclasses.replace(SAMPLING, max_new_tokens=14, eos_token_ids=(0, 1, 2, 3), pad_token_id=-1)
    generate(model, prompts[:1], settings)

    def in_batches():
        return list(generate_batches(model, prompts, settings, batch_size=3, seed=5, with_expert_load=True))

    compilations, batches = count_compilations(in_batches)
    assert compilations == 2
    assert [len(batch.lengths) for batch in batches] == [3, 3, 1]
    result = Generation.joined(batches, pad_token_id=settings.pad_token_id)
    at_once = generate(model, prompts, settings, seed=5, with_expert_load=True)
    np.testing.assert_array_equal(result.tokens, at_once.tokens)
    np.testing.assert_array_equal(result.lengths, at_once.lengths)
    np.testing.assert_array_equal(result.expert_load, at_once.expert_load)
    assert result.finish_reasons == at_once.finish_reasons
    assert result.timing.prompt_tokens == at_once.timing.prompt_tokens
    assert result.timing.decoded_tokens == at_once.timing.decoded_tokens


def test_tokens_of_batches_are_streamed_under_their_own_numbers(model, rng):
    prompts, seen = draw_prompts(rng, 5, 9, 2), [[], [], []]
    batches = generate_batches(
        model, prompts, SAMPLING, batch_size=2, on_token=lambda row, token: seen[row].append(token)
    )
    rows = [batch.row(row) for batch in batches for row in range(len(batch.lengths))]
    assert seen == rows


def test_a_row_may_end_with_its_first_token(model, table, rng):
    (prompt,) = draw_prompts(rng, 4)
    eos = expected_greedy(table, prompt, 1)[0]
    result = generate(model, [prompt], GenerationSettings(max_new_tokens=9, eos_token_ids=(eos,)))
    assert result.row(0) == [eos]
    assert result.finish_reasons == ("eos",)
    assert result.timing.decode_tokens_per_second == 0


def test_streamed_tokens_are_those_of_the_loop_on_the_device(model, rng):
    prompts = draw_prompts(rng, 8, 3)
    on_device = generate(model, prompts, SAMPLING, seed=7)
    seen = [[], []]
    streamed = generate(model, prompts, SAMPLING, seed=7, on_token=lambda row, token: seen[row].append(token))
    np.testing.assert_array_equal(on_device.tokens, streamed.tokens)
    assert seen == streamed.tokens.tolist()


def test_a_seed_repeats_a_generation_and_another_seed_changes_it(model, rng):
    prompts = draw_prompts(rng, 8, 3)
    settings = dataclasses.replace(SAMPLING, temperature=9.0)
    first, again, other = (generate(model, prompts, settings, seed=seed).tokens for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_what_a_row_draws_does_not_depend_on_the_other_rows(model, rng):
    prompts = draw_prompts(rng, 8, 3)
    together = generate(model, prompts, SAMPLING, seed=1)
    changed = generate(model, [prompts[0], *draw_prompts(rng, 14)], SAMPLING, seed=1)
    np.testing.assert_array_equal(together.tokens[0], changed.tokens[0])


def test_a_top_p_of_1_leaves_every_token_as_none_does(model, rng):
    prompts = draw_prompts(rng, 8, 3)
    tokens = [
        generate(model, prompts, dataclasses.replace(SAMPLING, top_k=None, top_p=top_p, temperature=9.0)).tokens
        for top_p in (1, 1.0, None)
    ]
    np.testing.assert_array_equal(tokens[0], tokens[2])
    np.testing.assert_array_equal(tokens[1], tokens[2])


def test_sampled_first_tokens_follow_the_distribution(table, rng):
    """Chi-squared against the float64 softmax; beyond 6 standard deviations of its distribution is no accident."""
    (prompt,) = draw_prompts(rng, 5)
    draws = 4096
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, temperature=1.5)
    seed = int(rng.integers(2**31))
    result = generate(FadingMemoryModel(table), [prompt] * draws, settings, seed=seed)
    logits = expected_logits(table, prompt) / 1.5
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    observed = np.bincount(result.tokens[:, 0], minlength=VOCAB)
    statistic = ((observed - draws * probabilities) ** 2 / (draws * probabilities)).sum()
    degrees = VOCAB - 1
    assert statistic < degrees + 6 * np.sqrt(2 * degrees)


def test_tokens_of_all_steps_and_rows_are_drawn_independently(rng):
    """Of a model to which all tokens are alike: pairs of successive tokens, and of neighbouring rows, are as often equal as
    chance makes them.
    """
    rows, steps = 64, 64
    model = FadingMemoryModel(np.zeros((VOCAB, VOCAB), np.float32))
    settings = GenerationSettings(max_new_tokens=steps, do_sample=True)
    tokens = generate(model, [[1]] * rows, settings, seed=int(rng.integers(2**31))).tokens
    for equal in (tokens[:, 1:] == tokens[:, :-1], tokens[1:] == tokens[:-1]):
        deviation = np.sqrt(equal.size * (VOCAB - 1)) / VOCAB
        assert abs(equal.sum() - equal.size / VOCAB) < 6 * deviation
        # Nor does one step repeat another one in all rows, or a row another one in all steps; the first step is prefill's.
        assert not equal.all(axis=0).any()
        assert not equal.all(axis=1).any()


def test_expert_load_counts_prompt_and_new_tokens_but_neither_padding_nor_ended_rows(model, table, rng):
    prompts = draw_prompts(rng, 2, 9)
    eos = (expected_greedy(table, prompts[0], 4)[2],)
    result = generate(model, prompts, GenerationSettings(max_new_tokens=8, eos_token_ids=eos), with_expert_load=True)
    # The last token of a row is never read again.
    texts = [prompt + result.row(row)[:-1] for row, prompt in enumerate(prompts)]
    np.testing.assert_array_equal(result.expert_load, sum(expected_load(text) for text in texts))


def test_tokens_and_prompt_lengths_within_a_bucket_compile_nothing(model, rng):
    generate(model, draw_prompts(rng, 3, 5), SAMPLING)
    model.traces.clear()

    def more():
        for lengths, seed in (((1, 16), 1), ((9, 9), 2), ((16, 2), 3)):
            changed = dataclasses.replace(SAMPLING, max_new_tokens=16 - seed, temperature=0.5 + seed, top_p=0.3 * seed)
            generate(model, draw_prompts(rng, *lengths), changed, seed=seed)
            generate(model, draw_prompts(rng, *lengths), changed, seed=seed, on_token=lambda *_: None)

    compilations, _ = count_compilations(more)
    assert compilations == 0
    assert not model.traces


def test_only_another_bucket_compiles_and_then_two_programs(model, rng):
    settings = GenerationSettings(max_new_tokens=11)
    generate(model, draw_prompts(rng, 3), settings)
    compilations, _ = count_compilations(lambda: generate(model, draw_prompts(rng, 17), settings))
    assert compilations == 2


def test_new_weights_are_used_without_compiling(table, rng):
    model = FadingMemoryModel(table)
    (prompt,) = draw_prompts(rng, 6)
    settings = GenerationSettings(max_new_tokens=5)
    generate(model, [prompt], settings)
    changed = table[:, ::-1].copy()
    model.table[...] = changed
    compilations, result = count_compilations(lambda: generate(model, [prompt], settings))
    assert compilations == 0
    assert result.row(0) == expected_greedy(changed, prompt, 5)


def test_a_decoded_token_is_stored_in_the_cache_that_was_there(model):
    signature, _ = signature_of(
        model, batch_size=4, prompt_length=256, room=16, num_eos=0, do_sample=False, top_k=None, use_top_p=False,
        with_expert_load=False,
    )  # fmt: skip
    cache = jax.eval_shape(lambda: model.init_cache(4, 256 + 16))
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert compile_programs(signature).decode.memory_analysis().alias_size_in_bytes >= nbytes


@pytest.mark.parametrize(("length", "padded"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)])
def test_lengths_are_padded_to_powers_of_two(length, padded):
    assert bucket(length) == padded


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 4, "there is no prompt"),
        ([[1], []], 4, "prompt 1 has no tokens"),
        ([[1, VOCAB]], 4, f"legal are 0 to {VOCAB - 1}"),
        ([[3, -1]], 4, "token ids from -1 to 3"),
        (
            [[1], [1] * 500, [1]],
            13,
            "prompt 1 takes 500 of the model's 512 positions, which leaves 12 for new tokens, not 13$",
        ),
        (
            [[1] * 512],
            None,
            "prompt 0 has 512 tokens, which leaves no room for a new one in the model's 512 positions$",
        ),
        ([[1] * 600], 5, "prompt 0 has 600 tokens, which leaves no room for a new one in the model's 512 positions$"),
        (
            [1, 2, 3],
            4,
            "prompts must be a list of lists of token ids; prompt 0 is 1; one prompt alone stands in a list",
        ),
        ([[[1, 2]]], 4, r"prompts must be a list of lists of token ids; prompt 0 is \[\[1, 2\]\]$"),
        ([[1], [1.7, 2]], 4, r"prompt 1 holds something else than token ids: \[1.7, 2\]"),
        (["ab"], 4, "prompts must be a list of lists of token ids; prompt 0 is 'ab'"),
        ([["a"]], 4, "prompt 0 holds something else than token ids"),
        ([[2**31]], 4, f"legal are 0 to {VOCAB - 1}"),
        ([[2**70]], 4, "prompt 0 holds something else than token ids"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, GenerationSettings(max_new_tokens=max_new_tokens))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(model, seed):
    with pytest.raises(ValueError, match=rf"seed must be from -2\^63 to 2\^63 - 1, got {seed}"):
        generate(model, [[1]], GenerationSettings(max_new_tokens=2), seed=seed)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_rows_is_refused(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        list(generate_batches(model, [[1]], batch_size=batch_size))


@pytest.mark.parametrize(("seed", "other"), [(1, 1 + 2**32), (-1, 2**32 - 1), (-(2**63), 0), (2**62, 2**61)])
def test_seeds_that_differ_in_any_of_64_bits_draw_other_tokens(model, rng, seed, other):
    prompts, settings = draw_prompts(rng, 8, 3), dataclasses.replace(SAMPLING, temperature=9.0)
    tokens = [generate(model, prompts, settings, seed=value).tokens for value in (seed, other)]
    assert (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize("wanted", [13, 10**9])
def test_as_many_new_tokens_as_a_checkpoint_asks_for_are_generated_or_as_fit(model, table, rng, wanted):
    (prompt,) = draw_prompts(rng, 490)
    settings = GenerationSettings(default_new_tokens=wanted)
    assert generate(model, [prompt], settings).row(0) == expected_greedy(table, prompt, min(wanted, 22))


def test_a_mask_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        generate(model, np.ones((1, 3), int), attention_mask=np.ones((1, 2), int))


def test_a_prompt_may_use_every_position(model, table, rng):
    (prompt,) = draw_prompts(rng, 500)
    result = generate(model, [prompt], GenerationSettings(max_new_tokens=12))
    assert result.row(0) == expected_greedy(table, prompt, 12)
