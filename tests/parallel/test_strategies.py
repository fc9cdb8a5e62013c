"""Every dispatch strategy: the layer on a mesh equals the layer on one device, forward and backward, and counts what it moves.

A case is a strategy, where tokens are, sizes of the mesh, and what the layer is made of. `make test` runs a design in which every
pair of options meets at least once; the whole product is run with `MOE_JAX_WHOLE_PRODUCT=1`.
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.dispatch import count_sent_rows
from support.sharded_layers import (
    SHARED,
    assert_equal_forward_and_backward,
    layer_pair,
    make_mesh,
    small_config,
    transforms,
)

from moe_jax import GroupLimit, ParallelConfig, RouterConfig

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
    if strategy == "replicated":
        if tokens != "on all ranks of an expert axis" or option == "two micro-batches":
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


DESIGN = covering(PRODUCT)
CASES = PRODUCT if os.environ.get("MOE_JAX_WHOLE_PRODUCT") else DESIGN


def run_case(rng, strategy, tokens, expert, tensor, data, layer, option):
    changes, parts = LAYERS[layer]
    parallel = ParallelConfig(strategy=strategy, **TOKENS[tokens], **OPTIONS[option])
    mesh = make_mesh(data, expert, tensor)
    single, sharded = layer_pair(rng, small_config(**changes), mesh, parallel, **(parts() if parts else {}))
    x = jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32)  # an odd number: some ranks have fewer tokens, or none
    aux = assert_equal_forward_and_backward(single, sharded, x, rng)
    assert aux.dropped_rows == 0
    physical = aux.topk_ids[0] if sharded.replicas is None else np.asarray(sharded.replicas(aux.topk_ids[0]))
    assert aux.sent_rows.tolist() == count_sent_rows(physical, sharded.axes, sharded.config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
def test_layer_on_a_mesh_equals_the_layer_on_one_device(case, rng):
    run_case(rng, *case)
