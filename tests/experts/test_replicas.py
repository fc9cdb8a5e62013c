"""Redundant experts: which copy a token goes to (spec 4.1 and 5.7)."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts.replicas import ReplicaMap, choose_replicas, initial_physical_to_logical
from moe_jax.placement import compute_logical_maps
from moe_jax.runner.aux import count_expert_load

# logical_to_physical, replica_count, ids -> physical ids, load per slot: upstream's published cases (spec 5.7)
PUBLISHED = {
    "identity": ([[0], [1], [2], [3]], [1, 1, 1, 1], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [1, 1, 1, 1]),
    "shuffled": (
        [[3], [0], [1], [2]],
        [1, 1, 1, 1],
        [[0, 1], [2, 3], [0, 2]],
        [[3, 0], [1, 2], [3, 1]],
        [1, 2, 1, 2],
    ),
    "sparse": ([[5], [2], [7], [0]], [1, 1, 1, 1], [[0, 1], [2, 3]], [[5, 2], [7, 0]], [1, 0, 1, 0, 0, 1, 0, 1]),
    "partial redundancy": (
        [[0, 4], [1, 5], [2, -1], [3, -1]],
        [2, 2, 1, 1],
        [[0, 1], [2, 3], [0, 2]],
        [[0, 1], [2, 3], [0, 2]],
        [2, 1, 2, 1, 0, 0],
    ),
    "full redundancy": (
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        [2, 2, 2, 2],
        [[0, 1], [2, 3], [0, 2]],
        [[0, 1], [6, 7], [0, 2]],
        [2, 1, 1, 0, 0, 0, 1, 1],
    ),
    "uneven": (
        [[0, 3, 5, 7], [1, 4, -1, -1], [2, 6, -1, -1]],
        [4, 2, 2],
        [[0, 1], [2, 0], [1, 2]],
        [[0, 1], [6, 3], [1, 2]],
        [1, 2, 1, 1, 0, 0, 1, 0],
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_replica_choices_and_loads_are_reproduced(case):
    table, count, ids, expected, load = (jnp.array(value) for value in PUBLISHED[case])
    physical = choose_replicas(ids, table, count)
    np.testing.assert_array_equal(physical, expected)
    np.testing.assert_array_equal(count_expert_load(physical, len(load)), load)


def test_ids_of_no_expert_are_in_no_load():
    physical = choose_replicas(jnp.array([[0, -1], [-1, -1]]), jnp.array([[1], [0]]), jnp.array([1, 1]))
    assert count_expert_load(physical, 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [0, 1, 0, 1, 0, 1]), (3, [0, 0, 2, 2, 1, 0]), (4, [0, 1, 2, 3, 0, 1])]
)
def test_replica_of_first_tokens_follows_the_fibonacci_hash(count, expected):
    ids = jnp.zeros((6, 1), jnp.int32)
    chosen = choose_replicas(ids, jnp.arange(count)[None], jnp.array([count]))
    np.testing.assert_array_equal(chosen[:, 0], expected)


@pytest.mark.parametrize(("top_k", "copies"), [(2, 2), (4, 2), (8, 4), (8, 8)])
def test_copies_share_the_load_evenly_even_if_top_k_is_a_multiple_of_their_number(top_k, copies, rng):
    num_experts, num_tokens = 16, 8192
    ids = rng.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k]
    table = np.arange(num_experts * copies).reshape(num_experts, copies)
    physical = choose_replicas(jnp.array(ids), jnp.array(table), jnp.full(num_experts, copies))
    np.testing.assert_array_equal(np.asarray(physical) // copies, ids)
    load = np.bincount(np.asarray(physical).ravel(), minlength=num_experts * copies)
    assert load.max() / load.mean() < 1.15


def test_ids_that_name_no_expert_have_no_copy():
    table, count = compute_logical_maps(initial_physical_to_logical(3, 2), 3)
    physical = choose_replicas(jnp.array([[-1, 0], [3, 2], [7, 1]]), jnp.array(table), jnp.array(count))
    np.testing.assert_array_equal(physical, [[-1, 0], [-1, 2], [-1, 1]])


def test_zero_tokens_have_zero_copies():
    table, count = compute_logical_maps(initial_physical_to_logical(3, 2), 3)
    assert choose_replicas(jnp.zeros((0, 2), jnp.int32), jnp.array(table), jnp.array(count)).shape == (0, 2)


def test_initial_placement_repeats_the_first_experts():
    np.testing.assert_array_equal(initial_physical_to_logical(3, 4), [0, 1, 2, 0, 1, 2, 0])


def test_inverted_placement_lists_every_slot_of_every_expert(rng):
    num_experts, num_slots = 5, 9
    placement = np.concatenate([np.arange(num_experts), rng.integers(num_experts, size=num_slots - num_experts)])
    placement = rng.permutation(placement)
    table, count = compute_logical_maps(placement, num_experts)
    assert table.shape == (num_experts, num_slots - num_experts + 1)
    for expert in range(num_experts):
        slots = [slot for slot in range(num_slots) if placement[slot] == expert]
        assert table[expert].tolist() == slots + [-1] * (table.shape[1] - len(slots))
        assert count[expert] == len(slots)


def test_replaced_tables_are_those_of_the_new_placement(rng):
    replicas = ReplicaMap.initial(3, 2)
    placement = rng.permutation([0, 1, 2, 2, 1])
    replicas.replace(placement)
    expected = ReplicaMap(placement, 3)
    for name in ("physical_to_logical", "logical_to_physical", "replica_count"):
        table = getattr(replicas, name)[...]
        np.testing.assert_array_equal(table, getattr(expected, name)[...])
        assert not table.committed, "it may still go wherever the layer is used"
    np.testing.assert_array_equal(replicas.physical_to_logical[...], placement)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([0, 2, 2, 0, 0], r"every logical expert needs a physical slot, got none for \[1\]"),
        ([0, 1, 2, 0], r"must have the shape \(5,\), got \(4,\)"),
    ],
)
def test_placement_that_cannot_replace_another_is_refused(placement, message):
    with pytest.raises(ValueError, match=message):
        ReplicaMap.initial(3, 2).replace(np.array(placement))
