"""Every dispatch strategy: the layer on a mesh equals the layer on one device, forward and backward, and counts what it moves.

A case is a strategy, where tokens are, sizes of the mesh, and what the layer is made of. `make test` runs a design in which every
pair of options meets at least once; `make test-slow` every strategy with every mesh and every layer, where tokens are and the
options in turn; `MOE_JAX_WHOLE_PRODUCT=1` makes either run the whole product.
"""

import functools
import itertools
import os
import secrets

import jax.numpy as jnp
import numpy as np
import pytest
from oracles.dispatch import count_sent_rows
from oracles.layers_under_test import random_layer
from support.sharded_layers import (
    SHARED,
    assert_equal_results,
    make_mesh,
    sharded_like,
    small_config,
    transforms,
    value_and_gradients,
)

from moe_jax import ParallelConfig

STRATEGIES = ("replicated", "allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all")
ALL_TO_ALL = STRATEGIES[2:]

TOKENS = {
    # Which axes split experts, tensors, data and the sequence.
    "on all ranks of an expert axis": dict(expert_axis="expert", tensor_axis="tensor", data_axis="data"),
    "split over the expert axis": dict(
        expert_axis="expert", tensor_axis="tensor", data_axis="data", sequence_axis="expert"
    ),
    "as in vLLM": dict(expert_axis=("data", "expert"), tensor_axis="tensor", data_axis="data"),
    "split over a tensor axis": dict(expert_axis="expert", tensor_axis=("tensor", "data"), data_axis="data"),
}
LAYERS = {
    "plain": (dict(), None),
    "shared": (dict(shared_experts=SHARED), None),
    "transforms": (dict(shared_experts=SHARED), transforms),
    "redundancy": (dict(shared_experts=SHARED, num_experts=12, num_redundant_experts=4, top_k=3), None),
}
OPTIONS = {
    "one row per expert": dict(),
    "one row per rank": dict(one_row_per_rank=True),
    "two micro-batches": dict(micro_batches=2),
}
EXPERT, TENSOR, DATA = (1, 2, 4, 8), (1, 2), (1, 2)


def is_legal(strategy, tokens, expert, tensor, data, layer, option):
    """Whether the strategy can run so, on eight devices."""
    if expert * tensor * data > 8:
        return False
    if strategy == "replicated" and (tokens != "on all ranks of an expert axis" or option == "two micro-batches"):
        return False
    return strategy in ALL_TO_ALL or option != "one row per rank"


FACTORS = (STRATEGIES, tuple(TOKENS), EXPERT, TENSOR, DATA, tuple(LAYERS), tuple(OPTIONS))
PRODUCT = [case for case in itertools.product(*FACTORS) if is_legal(*case)]


def pairs_of(case):
    return set(itertools.combinations(enumerate(case), 2))


def covering(cases):
    """A few of `cases` in which every pair of options that any of them has occurs: greedily, those with the most new pairs."""
    missing, chosen = set().union(*map(pairs_of, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def in_turn(cases):
    """One of `cases` for each strategy, mesh and layer: from one to the next, with other tokens and options."""

    def without_tokens_and_option(case):
        strategy, _, expert, tensor, data, layer, _ = case
        return STRATEGIES.index(strategy), expert, tensor, data, tuple(LAYERS).index(layer)

    ordered = sorted(cases, key=without_tokens_and_option)
    groups = [list(group) for _, group in itertools.groupby(ordered, without_tokens_and_option)]
    # Layers follow each other; after the last of them one step more, so that none always meets the same tokens.
    return [group[(turn + turn // len(LAYERS)) % len(group)] for turn, group in enumerate(groups)]


if os.environ.get("MOE_JAX_WHOLE_PRODUCT"):
    CASES, SLOW_CASES = PRODUCT, []
else:
    CASES = covering(PRODUCT)
    SLOW_CASES = [case for case in in_turn(PRODUCT) if case not in CASES]


@functools.cache
def on_one_device(layer):
    """A layer on one device with a problem, and what it answers: drawn and compiled once for all cases that share it."""
    seed = int(os.environ.get("MOE_JAX_TEST_SEED") or secrets.randbits(32))
    print(f"layer {layer!r} drawn from seed {seed}")
    rng = np.random.default_rng(seed)
    changes, parts = LAYERS[layer]
    parts = parts() if parts else {}
    single = random_layer(rng, small_config(**changes), **parts)
    # An odd number of tokens: some ranks have fewer than others, or none.
    x, direction = (jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32) for _ in range(2))
    return single, parts, x, direction, value_and_gradients(single, x, direction)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=lambda case: ", ".join(map(str, case)),
)
def test_layer_on_a_mesh_equals_the_layer_on_one_device(case):
    strategy, tokens, expert, tensor, data, layer, option = case
    single, parts, x, direction, expected = on_one_device(layer)
    parallel = ParallelConfig(strategy=strategy, **TOKENS[tokens], **OPTIONS[option])
    sharded = sharded_like(single, make_mesh(data, expert, tensor), parallel, **parts)
    aux = assert_equal_results(expected, value_and_gradients(sharded, x, direction))
    assert aux.dropped_rows == 0
    physical = aux.topk_ids[0] if sharded.replicas is None else np.asarray(sharded.replicas(aux.topk_ids[0]))
    assert aux.sent_rows.tolist() == count_sent_rows(physical, sharded.axes, sharded.config)
