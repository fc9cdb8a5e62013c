"""The two compiled programs of a generation: prefill reads the prompts, decode appends tokens.

Both depend on shapes alone, and the shapes come in few sizes (`bucket`), so that neither a token nor, usually,
another prompt length compiles anything. Everything that changes between calls (lengths, limits, seeds, temperature)
is an argument.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.device_layouts import described
from moe_jax.generation.sampling import greedy, penalize_repetition, row_keys, sample

SMALLEST_BUCKET = 16
MAX_PROGRAMS = 32
"""Compiled programs kept; the least recently used go first."""
GPU_PLATFORMS = ("gpu", "cuda", "rocm")
"""What devices that are GPUs call their platform."""
GPU_OVERLAP_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""Compiler options with which communication between GPUs hides behind computation."""


def bucket(length: int) -> int:
    """The length to which `length` is padded: the next power of two, at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """What may change from call to call without compiling."""

    seed_key: Key[Array, ""]
    first_row: Int[Any, ""]
    """Number of the batch's first row among all prompts."""
    temperature: Float[Any, ""]
    top_p: Float[Any, ""]
    repetition_penalty: Float[Any, ""]
    eos_token_ids: Int[Any, "N"]
    pad_token_id: Int[Any, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A generation under way; `step` tokens of each row exist."""

    cache: Any
    tokens: Int[Array, "B N"]
    """New tokens, then padding; N is `Signature.room`."""
    lengths: Int[Array, "B"]
    """New tokens of each row, its end-of-sequence token included."""
    ended: Bool[Array, "B"]
    """The row's latest token ended it."""
    positions: Int[Array, "B"]
    """Position of the next token."""
    step: Int[Array, ""]
    seen: Bool[Array, "B V"] | None
    """Which tokens each row holds, those of its prompt included; None if repetition is not penalized."""
    expert_load: Int[Array, "L E"] | None
    """Choices of each expert per MoE layer so far; None if not asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """Everything that the programs depend on; equal signatures share them."""

    graphdef: Any
    """Structure of the model (`nnx.split`)."""
    state_structure: Any
    """Tree structure of the model's state."""
    state_leaves: tuple[jax.ShapeDtypeStruct, ...]
    """Shape, dtype, sharding and layout of every array of the model."""
    mesh: Mesh | None
    """Devices that the model is spread over."""
    batch_size: int
    prompt_length: int
    """Prompts are padded on the left to this length."""
    room: int
    """How many new tokens fit."""
    num_eos: int
    do_sample: bool
    top_k: int | None
    use_top_p: bool
    penalizes_repetition: bool = False
    with_expert_load: bool

    @property
    def cache_length(self) -> int:
        """Tokens of a row that the cache holds."""
        return self.prompt_length + self.room

    @property
    def everywhere(self) -> NamedSharding | None:
        """What is small is whole on every device of a mesh, so that each process gives it and reads it alone."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one signature."""

    prefill: jax.stages.Compiled
    """`prefill` without its first argument."""
    decode: jax.stages.Compiled
    """`decode` without its first argument; it consumes `progress`."""


def signature_of(model: nnx.Module, **sizes: Any) -> tuple[Signature, Any]:
    """The signature of `model` with `sizes` (the remaining fields of `Signature`), and the model's state."""
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    avals = tuple(map(described, leaves))
    mesh = getattr(model, "mesh", None)
    return Signature(graphdef=graphdef, state_structure=structure, state_leaves=avals, mesh=mesh, **sizes), state


def choose_tokens(
    logits: Float[Array, "B V"],
    controls: Controls,
    step: Int[Array, ""],
    signature: Signature,
    seen: Bool[Array, "B V"] | None,
) -> Int[Array, "B"]:
    """The next token of each row, greedy or drawn; tokens that a row has `seen` are penalized first."""
    if seen is not None:
        logits = penalize_repetition(logits, seen, controls.repetition_penalty)
    if not signature.do_sample:
        return greedy(logits)
    rows = controls.first_row + jnp.arange(signature.batch_size)
    return sample(
        logits,
        row_keys(controls.seed_key, step, rows),
        temperature=controls.temperature,
        top_k=signature.top_k,
        top_p=controls.top_p if signature.use_top_p else None,
    )


def run_model(
    signature: Signature, model: Any, input_ids: Int[Array, "B S"], **inputs: Any
) -> tuple[Float[Array, "B V"], Any, Int[Array, "L E"] | None]:
    """Logits after the last token of each row, the new cache, and the expert load if asked for."""
    hidden, cache, aux = model.hidden_states(input_ids, with_aux=signature.with_expert_load, **inputs)
    return model.logits(hidden[:, -1]), cache, None if aux is None else aux.expert_load


def with_tokens(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B S"], counted: Bool[Array, "B S"] | bool = True
) -> Bool[Array, "B V"]:
    """`seen`, and of each row those of its `tokens` that are `counted`."""
    vocab_size = seen.shape[-1]
    rows = jnp.arange(len(tokens))[:, None]
    # An id that is outside the vocabulary is dropped; a negative one would count from its end.
    is_token = counted & (tokens >= 0)
    return seen.at[rows, jnp.where(is_token, tokens, vocab_size)].set(True, mode="drop")


def is_any_of(tokens: Int[Array, "B"], candidates: Int[Array, "N"]) -> Bool[Array, "B"]:
    """Whether each token is one of `candidates`, of which there may be none."""
    return jnp.any(tokens[:, None] == candidates, axis=-1)


def prefill(
    signature: Signature,
    state: Any,
    input_ids: Int[Array, "B S"],
    attention_mask: Bool[Array, "B S"],
    controls: Controls,
) -> tuple[Progress, Int[Array, "B"], Bool[Array, "B"]]:
    """Read the prompts and choose the first new token of each row.

    Args:
        signature: what was compiled for.
        state: arrays of the model.
        input_ids: prompts, padded on the left; a row of nothing but padding has ended before it begins.
        attention_mask: False at padding.
        controls: sampling and end-of-sequence tokens.

    Returns:
        The generation under way, the chosen tokens, and which rows they end.
    """
    model = nnx.merge(signature.graphdef, state)
    # Padding gets position 0; the mask keeps everybody from looking at it.
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=-1, dtype=jnp.int32) - 1, 0)
    logits, cache, expert_load = run_model(
        signature,
        model,
        input_ids,
        attention_mask=attention_mask,
        positions=positions,
        cache=model.init_cache(signature.batch_size, signature.cache_length),
    )
    seen = None
    if signature.penalizes_repetition:
        seen = with_tokens(jnp.zeros(logits.shape, bool), input_ids, attention_mask)
    first = choose_tokens(logits, controls, jnp.int32(0), signature, seen)
    tokens = jnp.full((signature.batch_size, signature.room), controls.pad_token_id, jnp.int32)
    ended = is_any_of(first, controls.eos_token_ids) | ~jnp.any(attention_mask, axis=-1)
    progress = Progress(
        cache=cache,
        tokens=tokens.at[:, 0].set(first),
        lengths=jnp.ones(signature.batch_size, jnp.int32),
        ended=ended,
        positions=positions[:, -1] + 1,
        step=jnp.int32(1),
        seen=None if seen is None else with_tokens(seen, first[:, None]),
        expert_load=expert_load,
    )
    return progress, first, jnp.copy(ended)


def decode(
    signature: Signature, state: Any, progress: Progress, controls: Controls, limit: Int[Array, ""]
) -> tuple[Progress, Int[Array, "B"], Bool[Array, "B"]]:
    """Append tokens until `limit` of each row exist or all rows have ended.

    Returns:
        The generation under way, the latest tokens, and which rows have ended.
    """

    def unfinished(progress: Progress) -> Bool[Array, ""]:
        return (progress.step < limit) & ~jnp.all(progress.ended)

    def append(progress: Progress) -> Progress:
        latest = jax.lax.dynamic_index_in_dim(progress.tokens, progress.step - 1, axis=1)
        logits, cache, expert_load = run_model(
            signature,
            nnx.merge(signature.graphdef, state),
            latest,
            # Rows that have ended still take part in the batch; masked, they count nowhere.
            attention_mask=~progress.ended[:, None],
            positions=progress.positions[:, None],
            cache=progress.cache,
        )
        chosen = choose_tokens(logits, controls, progress.step, signature, progress.seen)
        chosen = jnp.where(progress.ended, controls.pad_token_id, chosen)
        return Progress(
            cache=cache,
            tokens=jax.lax.dynamic_update_index_in_dim(progress.tokens, chosen, progress.step, axis=1),
            lengths=progress.lengths + ~progress.ended,
            ended=progress.ended | is_any_of(chosen, controls.eos_token_ids),
            positions=progress.positions + 1,
            step=progress.step + 1,
            seen=None if progress.seen is None else with_tokens(progress.seen, chosen[:, None]),
            expert_load=jax.tree.map(jnp.add, progress.expert_load, expert_load),
        )

    progress = jax.lax.while_loop(unfinished, append, progress)
    latest = jax.lax.dynamic_index_in_dim(progress.tokens, progress.step - 1, axis=1, keepdims=False)
    # A copy: `progress` is consumed by the next call while the caller still reads this.
    return progress, latest, jnp.copy(progress.ended)


@functools.lru_cache(maxsize=MAX_PROGRAMS)
def compile_programs(signature: Signature) -> Programs:
    """Compile both programs; a signature that was seen before costs nothing."""
    options = compiler_options(signature)
    lowered_prefill = lower_prefill(signature)
    compiled_prefill = lowered_prefill.compile(options)
    return Programs(compiled_prefill, lower_decode(signature, lowered_prefill, compiled_prefill).compile(options))


def compiler_options(signature: Signature) -> dict[str, Any] | None:
    """How XLA should compile the programs; None: as it does by itself.

    Between several GPUs, only its latency-hiding scheduler puts computation between the start and the end of a collective.
    """
    devices = () if signature.mesh is None else signature.mesh.devices.flat
    is_spread = len(devices) > 1 and devices[0].platform in GPU_PLATFORMS
    return dict(GPU_OVERLAP_OPTIONS) if is_spread else None


def lower_prefill(signature: Signature) -> jax.stages.Lowered:
    """`prefill` without its first argument, ready to be compiled."""
    whole = signature.everywhere
    prompts = (signature.batch_size, signature.prompt_length)
    placed: Any = whole  # shardings stand where arrays will
    # The cache keeps the sharding in which the model creates it.
    delivered = Progress(
        cache=None,
        tokens=placed,
        lengths=placed,
        ended=placed,
        positions=placed,
        step=placed,
        seen=placed,
        expert_load=placed,
    )
    return jax.jit(functools.partial(prefill, signature), out_shardings=(delivered, whole, whole)).lower(
        _state(signature),
        jax.ShapeDtypeStruct(prompts, jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct(prompts, jnp.bool_, sharding=whole),
        _controls(signature),
    )


def lower_decode(
    signature: Signature, lowered_prefill: jax.stages.Lowered, compiled_prefill: jax.stages.Compiled
) -> jax.stages.Lowered:
    """`decode` without its first argument, ready to be compiled, for the progress that this prefill delivers."""
    # Decode hands its result to itself, so it keeps the shardings in which prefill delivers.
    progress, *_ = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        lowered_prefill.out_info,
        compiled_prefill.output_shardings,
    )
    jitted_decode = jax.jit(
        functools.partial(decode, signature), donate_argnums=1, out_shardings=compiled_prefill.output_shardings
    )
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=signature.everywhere)
    return jitted_decode.lower(_state(signature), progress, _controls(signature), limit)


def _state(signature: Signature) -> Any:
    return jax.tree.unflatten(signature.state_structure, signature.state_leaves)


def _controls(signature: Signature) -> Controls:
    """Shapes of the controls."""
    whole = signature.everywhere
    seed_key: Any = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=whole)
    return Controls(
        seed_key=seed_key,
        first_row=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        temperature=jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
        top_p=jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
        repetition_penalty=jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
        eos_token_ids=jax.ShapeDtypeStruct((signature.num_eos,), jnp.int32, sharding=whole),
        pad_token_id=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
