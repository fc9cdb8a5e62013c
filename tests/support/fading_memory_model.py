"""A causal language model that can be computed by hand, with the interface of `moe_jax.models.CausalLM`.

The logits after a token are the sum of the table rows of all tokens so far, each weighted by 2^-distance. So they
depend on every token, on positions, on the mask and on the cache, and a dozen lines of numpy say what they must be
(`expected_logits`).
"""

import dataclasses
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

NUM_LAYERS, NUM_EXPERTS = 3, 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Tokens seen so far; a slot that holds none has position -1."""

    tokens: jax.Array
    positions: jax.Array
    used: jax.Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a generation asks of `model.decoder`."""

    vocab_size: int
    max_positions: int
    moe_layers: tuple[int, ...] = tuple(range(NUM_LAYERS))


class FadingMemoryModel(nnx.Module):
    """Counts in `traces` how often each input shape was traced."""

    traces: Counter = Counter()

    def __init__(self, table: np.ndarray, max_positions: int = 512):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.decoder = Sizes(len(table), max_positions)
        self.dtype = jnp.dtype(jnp.float32)

    def init_cache(self, batch_size: int, max_length: int) -> Memory:
        empty = jnp.full((batch_size, max_length), -1, jnp.int32)
        return Memory(tokens=jnp.zeros_like(empty), positions=empty, used=jnp.int32(0))

    def hidden_states(self, input_ids, *, attention_mask, positions, cache, with_aux=False):
        self.traces[input_ids.shape] += 1
        mask = attention_mask.astype(bool)
        memory = Memory(
            tokens=jax.lax.dynamic_update_slice_in_dim(cache.tokens, input_ids, cache.used, axis=1),
            positions=jax.lax.dynamic_update_slice_in_dim(
                cache.positions, jnp.where(mask, positions, -1), cache.used, axis=1
            ),
            used=cache.used + input_ids.shape[1],
        )
        distance = positions[:, :, None] - memory.positions[:, None, :]
        visible = (memory.positions[:, None, :] >= 0) & (distance >= 0)
        weights = jnp.where(visible, 2.0**-distance, 0.0)
        hidden = jnp.einsum("bsc,bcv->bsv", weights, self.table[...][memory.tokens])
        if not with_aux:
            return hidden, memory, None
        layers = jnp.arange(NUM_LAYERS)[:, None, None, None]
        chosen = ((input_ids[..., None] + layers) % NUM_EXPERTS == jnp.arange(NUM_EXPERTS)) & mask[..., None]
        return hidden, memory, types.SimpleNamespace(expert_load=chosen.sum((1, 2), dtype=jnp.int32))

    def logits(self, hidden):
        return hidden


def expected_logits(table: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Logits after `tokens`, in float64."""
    distances = np.arange(len(tokens))[::-1]
    return (2.0**-distances) @ table.astype(np.float64)[tokens]


def expected_greedy(table: np.ndarray, prompt: list[int], max_new_tokens: int, eos: tuple[int, ...] = ()) -> list[int]:
    """The greedy continuation of `prompt`, its end-of-sequence token included."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(np.argmax(expected_logits(table, tokens))))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def expected_penalized(table: np.ndarray, prompt: list[int], max_new_tokens: int, penalty: float) -> list[int]:
    """`expected_greedy` with a repetition penalty, token by token as its definition goes."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = expected_logits(table, tokens)
        for token in set(tokens):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :]


def expected_load(tokens: list[int]) -> np.ndarray:
    """How often each expert of each layer is chosen for `tokens`."""
    load = np.zeros((NUM_LAYERS, NUM_EXPERTS), int)
    for layer in range(NUM_LAYERS):
        for token in tokens:
            load[layer, (token + layer) % NUM_EXPERTS] += 1
    return load
