"""Kernels are found in traced programs with the scalars that they get, and what they copy is counted from their schedules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.aot.tpu_calls import TpuKernelCall, tpu_kernel_calls, tpu_kernels
from moe_jax.aot.tpu_traffic import rows_traffic
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, TPU_SHAPES
from moe_jax.kernels import fused_moe, grouped_matmul
from moe_jax.kernels.device import TPU_DEVICES, targeting
from moe_jax.kernels.mosaic_tpu.schedule import ROW_ALIGNMENT

TOKENS = 1024


def calls_of(function, device, known, *arguments) -> list[TpuKernelCall]:
    with targeting(TPU_DEVICES[device]):
        traced = jax.make_jaxpr(function)(*arguments)
    return list(tpu_kernel_calls(traced, known))


def grouped(shape, device, sizes, width_out) -> TpuKernelCall:
    rows = jax.ShapeDtypeStruct((int(np.ceil(sizes.sum() / 16) * 16), shape.hidden_size), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((len(sizes), width_out, shape.hidden_size), jnp.bfloat16)
    function = lambda r, w, s: grouped_matmul(r, w, s, implementation="pallas_tpu")  # noqa: E731 - positional
    group_sizes = jax.ShapeDtypeStruct(sizes.shape, jnp.int32)
    (call,) = calls_of(function, device, {2: jnp.asarray(sizes, jnp.int32)}, rows, weights, group_sizes)
    return call


def experts_block(shape, device, ids) -> list[TpuKernelCall]:
    arguments = shape.fused_moe_arguments(len(ids))
    leaves, structure = jax.tree.flatten({name: value for name, value in arguments.items() if name != "topk_ids"})

    def block(ids, *leaves):
        floating = jax.tree.unflatten(structure, leaves)
        return fused_moe(
            **floating,
            topk_ids=ids,
            activation=shape.activation,
            expected_rows=shape.expected_rows(len(ids)),
            implementation="pallas_tpu",
        )

    return calls_of(block, device, {0: jnp.asarray(ids, jnp.int32)}, arguments["topk_ids"], *leaves)


EVERY_CASE = list(itertools.product(TPU_SHAPES, TPU_DEVICES, (2048, 8192)))
QUICK_CASES = [("qwen3-30b-a3b", "v6e", 2048), ("deepseek-v3-ep64", "7x", 2048)]


@pytest.mark.parametrize(
    ("model", "device", "tokens"),
    [pytest.param(*case, marks=[] if case in QUICK_CASES else pytest.mark.slow) for case in EVERY_CASE],
)
def test_gate_and_up_in_one_pass_move_at_most_six_tenths_of_two_matmuls_and_an_activation(model, device, tokens, rng):
    shape = EXPERT_SHAPES[model]
    ids = np.argsort(rng.random((tokens, shape.num_experts)), axis=1)[:, : shape.top_k]
    sizes = np.bincount(ids.reshape(-1), minlength=shape.num_experts)[: shape.local_experts]
    gate_up, _ = experts_block(shape, device, ids)
    one = rows_traffic(grouped(shape, device, sizes, shape.intermediate_size))
    activation = 3 * sizes.sum() * shape.intermediate_size * 2  # gate and up are read, their product is written
    assert rows_traffic(gate_up).other_than_weights <= 0.6 * (2 * one.other_than_weights + activation)


def test_weights_are_read_once_and_those_of_experts_without_rows_not_at_all(rng):
    shape = dataclasses.replace(EXPERT_SHAPES["olmoe-1b-7b"], num_experts=16, top_k=4)
    ids = rng.choice([0, 3, 4, 9, 15], size=(TOKENS, 1)) + np.zeros((1, 1), int)
    ids = np.concatenate([ids, np.full((TOKENS, 3), -1)], axis=1)
    matrix = shape.intermediate_size * shape.hidden_size * 2
    gate_up, down = experts_block(shape, "v6e", ids)
    assert rows_traffic(gate_up).experts_read == (0, 3, 4, 9, 15)
    assert rows_traffic(gate_up).weights_read == 5 * 2 * matrix
    assert rows_traffic(down).weights_read == 5 * matrix
    assert rows_traffic(down).results_written >= TOKENS * shape.hidden_size * 2


@pytest.mark.parametrize("hot_rows", [0, 600])
def test_where_cores_share_the_columns_each_reads_weights_once_and_rows_of_most_experts_too(hot_rows, rng):
    shape = EXPERT_SHAPES["deepseek-v3-ep64"]
    sizes = rng.integers(20, 150, shape.local_experts)
    sizes[1] += hot_rows
    gate_up = rows_traffic(experts_block(shape, "v5p", choices_of(sizes, 8192, shape, rng))[0])
    assert gate_up.weights_read == shape.local_experts * 2 * shape.intermediate_size * shape.hidden_size * 2
    rows = -(-sizes // ROW_ALIGNMENT) * ROW_ALIGNMENT  # what copies address
    several_visits = rows[1] if hot_rows else 0
    tiles_of_a_core = 4
    assert gate_up.rows_read == 2 * (rows.sum() + (tiles_of_a_core - 1) * several_visits) * shape.hidden_size * 2


def test_a_round_reads_no_weights_anew_but_those_of_the_expert_that_it_begins_with(rng):
    shape = EXPERT_SHAPES["deepseek-v3-ep64"]
    room = 1280  # for 1024 expected rows
    sizes = np.array([1000, 900, 800, 700])
    kernels = experts_block(shape, "v6e", choices_of(sizes, 8192, shape, rng))
    ends = np.cumsum(sizes)
    of_rounds = [
        tuple(np.flatnonzero((ends > first) & (ends - sizes < first + room))) for first in range(0, sizes.sum(), room)
    ]
    assert of_rounds == [(0, 1), (1, 2), (2, 3)]
    assert [call.name for call in kernels] == ["grouped_rows"] * 2 * len(of_rounds)
    assert [rows_traffic(call).experts_read for call in kernels] == [experts for experts in of_rounds for _ in range(2)]


def choices_of(sizes, tokens, shape, rng):
    """Choices of experts, of which so many name each of the first ones."""
    ids = rng.integers(len(sizes), shape.num_experts, (tokens, shape.top_k))
    ids.reshape(-1)[rng.permutation(ids.size)[: sizes.sum()]] = np.repeat(np.arange(len(sizes)), sizes)
    return ids


def test_scalars_are_computed_from_what_is_known_and_nothing_else_is(rng):
    shape = EXPERT_SHAPES["olmoe-1b-7b"]
    sizes = rng.integers(1, 100, shape.num_experts)
    call = grouped(shape, "v5e", sizes, 256)
    count = call.scalars[0]
    assert count >= shape.num_experts
    assert sorted(set(call.scalars[1][:count])) == list(range(shape.num_experts))  # groups that are visited
    assert len(call.scalars) == len(call.operands) - 2  # all but rows and weights
    assert 0 < call.vmem_bytes() <= TPU_DEVICES["v5e"].vmem_bytes
    assert call.sameness() == grouped(shape, "v5e", np.roll(sizes, 1), 256).sameness()
    assert call.sameness() != grouped(shape, "v5e", sizes, 384).sameness()


@pytest.mark.parametrize("known_turns", [True, False])
def test_a_kernel_in_a_loop_is_called_in_each_turn_if_their_number_is_known(known_turns, rng):
    rows, weights, sizes, turns = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((1024, 128), jnp.bfloat16),
            ((4, 128, 128), jnp.bfloat16),
            ((4,), jnp.int32),
            ((), jnp.int32),
        ]
    )

    def loop(rows, weights, sizes, turns):
        def step(turn, carry):
            return carry + grouped_matmul(rows, weights, jnp.roll(sizes, turn), implementation="pallas_tpu")

        return jax.lax.fori_loop(0, turns, step, jnp.zeros_like(rows))

    drawn = rng.permutation([300, 0, 0, 700])
    known = {2: jnp.asarray(drawn)} | ({3: 3} if known_turns else {})
    if not known_turns:
        with pytest.raises(ValueError, match="a loop of which the number of turns is not known"):
            calls_of(loop, "v6e", known, rows, weights, sizes, turns)
        return
    kernels = calls_of(loop, "v6e", known, rows, weights, sizes, turns)
    experts = [tuple(np.flatnonzero(np.roll(drawn, turn))) for turn in range(3)]
    assert [rows_traffic(call).experts_read for call in kernels] == experts
    with targeting(TPU_DEVICES["v6e"]):
        (in_the_text,) = tpu_kernels(jax.make_jaxpr(loop)(rows, weights, sizes, turns))
    assert in_the_text.sameness() == kernels[0].sameness()


def test_a_kernel_in_a_condition_is_refused(rng):
    def condition(rows, weights, sizes, it_is):
        multiply = lambda: grouped_matmul(rows, weights, sizes, implementation="pallas_tpu")  # noqa: E731
        return jax.lax.cond(it_is, multiply, lambda: jnp.zeros((64, 128), jnp.bfloat16))

    rows, weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (4, 128, 128)))
    sizes, it_is = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((), bool)
    with pytest.raises(ValueError, match="a kernel is called in cond"):
        calls_of(condition, "v6e", {2: jnp.full(4, 16, jnp.int32)}, rows, weights, sizes, it_is)
