"""Kernels that are given the tokens of many ranks make room for the rows that are expected, and compute all that there are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.implementations import UNDER_TEST
from support.moe_blocks import Block

from moe_jax.aot.jaxprs import equations
from moe_jax.kernels import explain_fused_moe, sum_of_rounds
from moe_jax.kernels.device import GPU_DEVICES, TPU_DEVICES, targeting
from moe_jax.kernels.fused_moe import rounds
from moe_jax.kernels.fused_moe.api import fused_moe

DEVICES = {"pallas_gpu": GPU_DEVICES["h200"], "pallas_tpu": TPU_DEVICES["v6e"]}
each_kernel = pytest.mark.parametrize("implementation", [UNDER_TEST[name] for name in DEVICES], ids=list(DEVICES))


@pytest.fixture
def in_small_rounds(monkeypatch):
    """Rounds of 1.25 times the expected rows, however little memory that saves."""
    monkeypatch.setattr(sum_of_rounds, "_ROWS_WORTH_A_ROUND", 0)
    for name in ("LEAST_BYTES_SAVED", "LEAST_BYTES_SAVED_WITH_GRADIENT"):
        monkeypatch.setattr(rounds, name, {"gpu": 1, "tpu": 1})
    jax.clear_caches()
    yield
    jax.clear_caches()


def one_rank(rng, implementation):
    """One of four ranks, with a hot expert and an empty one."""
    whole = Block.draw(rng, implementation, tokens=45, experts=12, top_k=3, bias=True, hidden=72)
    ids = whole.arrays["topk_ids"].at[::2, 0].set(4)
    return whole.with_arrays(topk_ids=jnp.where(ids == 5, 6, ids)).held(3, 6)


@each_kernel
@pytest.mark.parametrize("expected_rows", [8, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("in_small_rounds")
def test_rows_beyond_the_expected_ones_are_computed_in_further_rounds(implementation, expected_rows, rng):
    rank = one_rank(rng, implementation)
    num_local = int(np.sum((rank.arrays["topk_ids"] >= 3) & (rank.arrays["topk_ids"] < 6)))
    assert num_local > 2 * 1.25 * expected_rows  # three rounds or more
    result = rank.run(expert_offset=3, expected_rows=expected_rows)
    rank.assert_close(result, rank.expected(expert_offset=3))


@pytest.mark.slow
@each_kernel
@pytest.mark.usefixtures("in_small_rounds")
def test_rounds_read_the_weights_of_a_layer_in_a_stack(implementation, rng):
    rank = one_rank(rng, implementation)
    weights = ("gate_up_proj", "down_proj")
    others = {name: jnp.full_like(rank.arrays[name], jnp.nan) for name in weights}
    stacked = rank.with_arrays(**{name: jnp.stack([others[name], rank.arrays[name]]) for name in weights})
    with implementation.running():
        result = jax.jit(
            lambda arrays, layer: fused_moe(**arrays, layer=layer, expert_offset=3, expected_rows=8, **rank.options)
        )(stacked.arrays, 1)
    rank.assert_close(result, rank.expected(expert_offset=3))


@each_kernel
@pytest.mark.usefixtures("in_small_rounds")
def test_rounds_trace_under_vmap_over_calls_that_need_different_numbers_of_them(implementation, rng):
    rank = one_rank(rng, implementation)
    ids = rank.arrays.pop("topk_ids")

    def call(ids):
        return fused_moe(**rank.arrays, topk_ids=ids, expert_offset=3, expected_rows=8, **rank.options)

    with targeting(DEVICES[implementation.name]):
        program = jax.make_jaxpr(jax.vmap(call))(jnp.stack([ids, jnp.zeros_like(ids)]))
    assert num_loops(program) >= 1
    assert [result.shape for result in program.out_avals] == [(2, *rank.arrays["x"].shape)]


@each_kernel
@pytest.mark.usefixtures("in_small_rounds")
def test_tokens_without_a_local_expert_become_zero_without_a_round(implementation, rng):
    rank = one_rank(rng, implementation)
    rank = rank.with_arrays(topk_ids=jnp.full_like(rank.arrays["topk_ids"], 11))
    np.testing.assert_array_equal(np.asarray(rank.run(expert_offset=3, expected_rows=8), np.float32), 0)


@pytest.mark.slow
@each_kernel
@pytest.mark.parametrize("recompute_activation", [False, True])
@pytest.mark.usefixtures("in_small_rounds")
def test_gradients_are_those_of_all_rounds(implementation, recompute_activation, rng):
    rank = one_rank(rng, implementation)
    cotangent = rank.draw_cotangent(rng)
    options = dict(expert_offset=3, expected_rows=8, recompute_activation=recompute_activation)
    rank.assert_gradients_right(rank.gradients(cotangent, **options), cotangent, expert_offset=3)


@pytest.mark.slow
@pytest.mark.parametrize("on_the_input", [False, True])
def test_rows_that_a_gpu_does_not_write_may_hold_nan(on_the_input, rng, monkeypatch):
    """Where most choices are other ranks', rows are scattered into memory that holds anything."""
    written = []

    def poisoned(shape, dtype):
        written.append(shape)
        return jnp.full(shape, jnp.nan, dtype)

    monkeypatch.setattr(jax.lax, "empty", poisoned)
    rank = one_rank(rng, UNDER_TEST["pallas_gpu"])
    rank = dataclasses.replace(rank, apply_router_weight_on_input=on_the_input)
    cotangent = rank.draw_cotangent(rng)
    gradients = rank.gradients(cotangent, expert_offset=3, expected_rows=34)
    assert written
    rank.assert_gradients_right(gradients, cotangent, expert_offset=3)


@each_kernel
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.usefixtures("in_small_rounds")
def test_rounds_and_their_gradients_trace_on_devices_that_need_different_numbers_of_them(
    implementation, check_vma, rng
):
    block = Block.draw(rng, implementation, tokens=45, experts=12, top_k=3)
    ids = block.arrays["topk_ids"]
    floating = {name: array for name, array in block.arrays.items() if name != "topk_ids"}
    specs = {name: P("expert") if name.endswith("_proj") else P() for name in floating}

    def local(floating):
        offset = jax.lax.axis_index("expert") * 3
        result = fused_moe(
            **floating, topk_ids=ids, expert_offset=offset, expected_rows=34, implementation=implementation.name
        )
        return jax.lax.psum(result, "expert")

    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma)
    with targeting(DEVICES[implementation.name]):
        program = jax.make_jaxpr(jax.grad(lambda floating: sharded(floating).astype(jnp.float32).sum()))(floating)
    assert num_loops(program) == 2
    assert [result.shape for result in program.out_avals] == [floating[name].shape for name in sorted(floating)]


def deepseek_v3(tokens, ranks):
    """Shapes of `fused_moe`'s arguments on one of so many ranks."""
    shape = jax.ShapeDtypeStruct
    arguments = dict(
        x=shape((tokens, 7168), jnp.bfloat16),
        topk_weights=shape((tokens, 8), jnp.float32),
        topk_ids=shape((tokens, 8), jnp.int32),
        gate_up_proj=shape((256 // ranks, 2, 2048, 7168), jnp.bfloat16),
        down_proj=shape((256 // ranks, 7168, 2048), jnp.bfloat16),
    )
    return arguments, dict(activation="silu", expected_rows=tokens * 8 // ranks)


@pytest.mark.parametrize(
    ("implementation", "tokens", "ranks", "rounds"),
    [
        ("pallas_tpu", 32768, 1, ""),  # all choices are its own
        ("pallas_tpu", 512, 32, ""),  # little memory is saved
        ("pallas_tpu", 1024, 32, "in rounds of 512 rows, for a gradient of all rows"),
        ("pallas_tpu", 8192, 64, "in rounds of 1280 rows, for a gradient of all rows"),
        ("pallas_tpu", 12288, 32, "in rounds of 3840 rows, for a gradient of 4096 rows"),
        ("pallas_tpu", 32768, 8, "in rounds of 40960 rows"),
        ("pallas_gpu", 32768, 8, ""),  # the host would wait
        ("pallas_gpu", 65536, 8, "in rounds of 81920 rows"),
    ],
)
def test_a_call_says_how_many_rows_it_computes_at_once(implementation, tokens, ranks, rounds):
    arguments, options = deepseek_v3(tokens, ranks)
    with targeting(DEVICES[implementation]):
        formulation = explain_fused_moe(**arguments, **options).formulation
    assert formulation.endswith(f", {rounds}") if rounds else "rounds" not in formulation


@pytest.mark.parametrize("in_a_stack", [False, True])
def test_a_gradient_is_taken_of_all_rows_at_once_where_rounds_save_less_than_adding_up_gradients_takes(in_a_stack):
    arguments, options = deepseek_v3(8192, 64)
    ids = arguments.pop("topk_ids")
    if in_a_stack:
        options["layer"] = 1
        for name in ("gate_up_proj", "down_proj"):
            arguments[name] = jax.ShapeDtypeStruct((3, *arguments[name].shape), jnp.bfloat16)

    def block(arguments, ids):
        return fused_moe(**arguments, topk_ids=ids, implementation="pallas_tpu", **options)

    def gradient(arguments, ids):
        return jax.grad(lambda arguments: block(arguments, ids).astype(jnp.float32).sum())(arguments)

    with targeting(DEVICES["pallas_tpu"]):
        assert num_loops(jax.make_jaxpr(block)(arguments, ids)) == 1
        assert num_loops(jax.make_jaxpr(gradient)(arguments, ids)) == 0


@pytest.mark.slow
def test_results_in_rounds_have_the_gradients_of_all_rows_at_once(rng, monkeypatch):
    monkeypatch.setattr(sum_of_rounds, "_ROWS_WORTH_A_ROUND", 0)
    monkeypatch.setattr(rounds, "LEAST_BYTES_SAVED", {"tpu": 1})
    jax.clear_caches()
    rank = one_rank(rng, UNDER_TEST["pallas_tpu"])
    cotangent = rank.draw_cotangent(rng)
    result = rank.run(expert_offset=3, expected_rows=8)
    rank.assert_close(result, rank.expected(expert_offset=3))
    gradients = rank.gradients(cotangent, expert_offset=3, expected_rows=8)
    rank.assert_gradients_right(gradients, cotangent, expert_offset=3)
    jax.clear_caches()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_nothing_in_the_program_has_room_for_all_choices(with_gradient):
    """Of DeepSeek-V3 on one of 64 ranks, 65,536 tokens: 524,288 choices, of which 8,192 are expected here."""
    arguments, options = deepseek_v3(65536, 64)
    ids = arguments.pop("topk_ids")

    def block(arguments, ids):
        return fused_moe(**arguments, topk_ids=ids, implementation="pallas_tpu", **options)

    def gradient(arguments, ids):
        return jax.grad(lambda arguments: block(arguments, ids).astype(jnp.float32).sum())(arguments)

    with targeting(DEVICES["pallas_tpu"]):
        program = jax.make_jaxpr(gradient if with_gradient else block)(arguments, ids)
    rows = {shape[0] for shape in shapes_in(program) if len(shape) == 2 and shape[1] in (2048, 4096, 7168)}
    assert 65536 in rows
    assert max(rows - {65536}) < 1.5 * 8192


def shapes_in(program):
    """Of every array that a program computes."""
    return (array.aval.shape for equation in equations(program) for array in equation.outvars)


def num_loops(program):
    """Loops of a program, those of kernels not counted."""
    kernels = ("pallas_call", "mpmd_map")
    return sum(equation.primitive.name == "while" for equation in equations(program, not_inside=kernels))
