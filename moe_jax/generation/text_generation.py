"""Generate tokens: batches of prompts of any lengths, greedy or sampled, streamed if wanted."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from moe_jax.generation.programs import Controls, Signature, bucket, compile_programs, signature_of
from moe_jax.generation.sampling import seed_key
from moe_jax.generation.settings import GenerationSettings

FinishReason = Literal["eos", "length"]
TokenCallback = Callable[[int, int], None]
"""`f(row, token)`, called for every new token as soon as it is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Where the time of a generation went."""

    compile_seconds: float
    """Compiling, if the shapes were not seen before; otherwise nearly nothing."""
    prefill_seconds: float
    """Reading the prompts, up to the first new token of every row."""
    prompt_tokens: int
    """Tokens in all prompts, padding not counted."""
    decode_seconds: float
    """Everything after the first new token."""
    decoded_tokens: int
    """New tokens of all rows but the first of each, which comes with the prompts."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoded tokens per second, over all rows; 0 if there was nothing to decode."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else 0.0

    @classmethod
    def total(cls, timings: Sequence["Timing"]) -> "Timing":
        """The timing of several generations, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: sum(getattr(timing, name) for timing in timings) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns; B rows, N the length of the longest."""

    tokens: Int[np.ndarray, "B N"]
    """New tokens, int32, without the prompt; a row that ended early is filled with the padding token."""
    lengths: Int[np.ndarray, "B"]
    """How many tokens of each row count, its end-of-sequence token included."""
    finish_reasons: tuple[FinishReason, ...]
    """Why each row ended: an end-of-sequence token, or max_new_tokens."""
    expert_load: Int[np.ndarray, "L E"] | None
    """How often each expert of each MoE layer was chosen, over prompts and new tokens but each row's last, which never enters the
    model; None unless asked for."""
    timing: Timing

    def row(self, index: int) -> list[int]:
        """The new tokens of one row, without what fills it."""
        return self.tokens[index, : self.lengths[index]].tolist()

    @classmethod
    def joined(cls, batches: Sequence["Generation"], *, pad_token_id: int) -> "Generation":
        """The rows of several generations as one."""
        width = max(batch.tokens.shape[1] for batch in batches)

        def widened(tokens: Int[np.ndarray, "B N"]) -> Int[np.ndarray, "B width"]:
            return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=pad_token_id)

        loads = [batch.expert_load for batch in batches if batch.expert_load is not None]
        return cls(
            tokens=np.concatenate([widened(batch.tokens) for batch in batches]),
            lengths=np.concatenate([batch.lengths for batch in batches]),
            finish_reasons=tuple(reason for batch in batches for reason in batch.finish_reasons),
            expert_load=np.sum(loads, axis=0) if loads else None,
            timing=Timing.total([batch.timing for batch in batches]),
        )


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "B S"],
    settings: GenerationSettings | None = None,
    *,
    attention_mask: Any = None,
    seed: int = 0,
    on_token: TokenCallback | None = None,
    with_expert_load: bool = False,
) -> Generation:
    """Continue every prompt until it ends or has `settings.max_new_tokens` new tokens.

    Prompts are padded to a power of two, and so is the room for new tokens; only another padded shape (or batch size)
    compiles. What a row gets depends on its prompt, its number in the batch and `seed`, not on the other rows. So
    `settings.repetition_penalty` leaves padding out, while `transformers` penalizes the padding token of a row that is
    shorter than others.

    Args:
        model: a causal language model, see `moe_jax.from_pretrained`.
        prompts: token ids of each prompt, of any lengths; or an array in which `attention_mask` tells them from
            padding.
        settings: greedy for 128 tokens by default; `read_generation_settings` gives a checkpoint's own.
        attention_mask: [B, S], nonzero at the tokens of a padded array of prompts, whichever side the padding is on.
        seed: where randomness starts from, when `settings.do_sample`; from -2^63 to 2^63 - 1.
        on_token: called with (row, token) for every new token when it is known, and then tokens are computed one by
            one. Without it the whole loop runs on the device.
        with_expert_load: count how often each expert is chosen.

    Raises:
        ValueError: there is no prompt, one is empty or holds anything but ids of the vocabulary, prompt and new tokens
            together exceed the positions that the model was made for, or the seed is out of range.
    """
    rows = unpadded(prompts, attention_mask)
    (result,) = generate_batches(
        model,
        rows,
        settings,
        batch_size=max(1, len(rows)),
        seed=seed,
        on_token=on_token,
        with_expert_load=with_expert_load,
    )
    return result


def generate_batches(
    model: Any,
    prompts: Sequence[Sequence[int] | Int[np.ndarray, "length"]],
    settings: GenerationSettings | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    on_token: TokenCallback | None = None,
    with_expert_load: bool = False,
) -> Iterator[Generation]:
    """`generate` for any number of prompts, `batch_size` at a time: memory for their caches is bounded.

    What a row gets is the same whatever the size of batches. The last batch is filled up with empty rows, so that it
    compiles nothing, and so that batches compile only where prompts are longer than those before by a power of two.

    Args:
        model: see `generate`, as for the other arguments.
        prompts: token ids of each prompt.
        settings: if they give no `max_new_tokens`, the longest of all prompts decides how many there may be.
        batch_size: most prompts at once.
        seed: where randomness starts from.
        on_token: called with the number of the row among all prompts, and the token.
        with_expert_load: count how often each expert is chosen, in each batch.

    Yields:
        The generation of each batch, as soon as it is there; `Generation.joined` makes them one.

    Raises:
        ValueError: see `generate`, or `batch_size` isn't positive; before anything is generated.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be from -2^63 to 2^63 - 1, got {seed}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    settings = settings or GenerationSettings()
    rows = unpadded(prompts, None)
    max_new_tokens = check_prompts(rows, settings, model.decoder)
    for first_row in range(0, len(rows), batch_size):
        batch = rows[first_row : first_row + batch_size]
        signature, state = signature_of(
            model,
            batch_size=min(batch_size, len(rows)),
            prompt_length=bucket(max(map(len, batch))),
            room=bucket(max_new_tokens),
            num_eos=len(settings.eos_token_ids),
            do_sample=settings.do_sample,
            top_k=settings.top_k if settings.do_sample else None,
            # A sum of float32 reaches 1 before all tokens are counted, so 1 would not mean all of them.
            use_top_p=settings.do_sample and settings.top_p not in (None, 1),
            penalizes_repetition=settings.repetition_penalty != 1,
            with_expert_load=with_expert_load,
        )
        controls = Controls(
            seed_key=seed_key(seed),
            first_row=np.int32(first_row),
            temperature=np.float32(settings.temperature),
            top_p=np.float32(1.0 if settings.top_p is None else settings.top_p),
            repetition_penalty=np.float32(settings.repetition_penalty),
            eos_token_ids=np.asarray(settings.eos_token_ids, np.int32),
            pad_token_id=np.int32(settings.pad_token_id),
        )
        yield run(signature, state, batch, controls, max_new_tokens, on_token)


def unpadded(prompts: Any, attention_mask: Any) -> list[Int[np.ndarray, "length"]]:
    """The prompts one by one, without padding; ValueError if they are anything but lists of integers."""
    rows = [token_ids_of(number, prompt) for number, prompt in enumerate(prompts)]
    if attention_mask is None:
        return rows
    mask = np.asarray(attention_mask) != 0
    shape = (len(rows), *{row.shape[0] for row in rows})  # of prompts of one length
    if shape != mask.shape:
        raise ValueError(f"attention_mask must have the shape of the prompts, {shape}, got {mask.shape}")
    return [row[kept] for row, kept in zip(rows, mask, strict=True)]


def token_ids_of(number: int, prompt: Any) -> Int[np.ndarray, "length"]:
    """One prompt as an array, in whatever integer type holds its ids."""
    ids = np.asarray(prompt)
    if ids.ndim != 1:
        raise ValueError(
            f"prompts must be a list of lists of token ids; prompt {number} is {prompt!r}"
            + ("; one prompt alone stands in a list of its own" if ids.ndim == 0 else "")
        )
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt {number} holds something else than token ids: {prompt!r}")
    return ids


def check_prompts(
    rows: Sequence[Int[np.ndarray, "length"]],
    settings: GenerationSettings,
    decoder: Any,
    names: Sequence[str] | None = None,
) -> int:
    """How many new tokens to generate; ValueError unless the model can continue every prompt by that many.

    `names` is what messages call the prompts; None: their indices.
    """
    if not rows:
        raise ValueError("there is no prompt to continue")
    if names is None:
        names = [f"prompt {number}" for number in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        if row.size == 0:
            raise ValueError(f"{name} has no tokens; a prompt needs at least one")
        if row.min() < 0 or row.max() >= decoder.vocab_size:
            raise ValueError(
                f"{name} holds token ids from {row.min()} to {row.max()}; legal are 0 to {decoder.vocab_size - 1}"
            )
    longest, name = max(zip(map(len, rows), names, strict=True), key=lambda length_and_name: length_and_name[0])
    room = decoder.max_positions - longest
    if room < 1:
        raise ValueError(
            f"{name} has {longest} tokens, which leaves no room for a new one in the model's "
            f"{decoder.max_positions} positions"
        )
    if settings.max_new_tokens is None:
        return min(settings.default_new_tokens, room)
    if settings.max_new_tokens > room:
        raise ValueError(
            f"{name} takes {longest} of the model's {decoder.max_positions} positions, which leaves {room} for new tokens, "
            f"not {settings.max_new_tokens}"
        )
    return settings.max_new_tokens


def pad_left(
    rows: Sequence[Int[np.ndarray, "length"]], count: int, width: int
) -> tuple[Int[np.ndarray, "count width"], np.ndarray]:
    """Token ids with zeros on the left, and the mask that is True at tokens; rows that are missing are all padding."""
    input_ids, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    for number, row in enumerate(rows):
        input_ids[number, width - len(row) :], mask[number, width - len(row) :] = row, True
    return input_ids, mask


def run(
    signature: Signature,
    state: Any,
    rows: Sequence[Int[np.ndarray, "length"]],
    controls: Controls,
    max_new_tokens: int,
    on_token: TokenCallback | None,
) -> Generation:
    """Run the programs of `signature` on checked prompts, at most as many as it has rows."""
    started = time.perf_counter()
    programs = compile_programs(signature)
    compiled = time.perf_counter()

    inputs = pad_left(rows, signature.batch_size, signature.prompt_length)
    prefill_started = time.perf_counter()
    progress, latest, ended = programs.prefill(state, *inputs, controls)
    latest, ended = np.asarray(latest), np.asarray(ended)
    first_token = time.perf_counter()
    if on_token is None:
        progress, _, _ = programs.decode(state, progress, controls, np.int32(max_new_tokens))
    else:
        running = np.arange(signature.batch_size) < len(rows)
        for step in range(1, max_new_tokens + 1):
            for row in np.flatnonzero(running):
                on_token(int(controls.first_row + row), int(latest[row]))
            running = ~ended
            if step == max_new_tokens or not running.any():
                break
            progress, latest, ended = programs.decode(state, progress, controls, np.int32(step + 1))
            latest, ended = np.asarray(latest), np.asarray(ended)
    lengths = np.array(progress.lengths)[: len(rows)]
    finished = time.perf_counter()

    return Generation(
        tokens=np.array(progress.tokens)[: len(rows), : lengths.max()],
        lengths=lengths,
        finish_reasons=tuple("eos" if row_ended else "length" for row_ended in np.array(progress.ended)[: len(rows)]),
        expert_load=None if progress.expert_load is None else np.array(progress.expert_load),
        timing=Timing(
            compile_seconds=compiled - started,
            prefill_seconds=first_token - prefill_started,
            prompt_tokens=sum(map(len, rows)),
            decode_seconds=finished - first_token,
            decoded_tokens=int(lengths.sum()) - len(rows),
        ),
    )
