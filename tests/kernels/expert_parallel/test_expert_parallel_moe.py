"""The expert-parallel MoE block: every implementation, gradients, and the choice between them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.expert_parallel_problems import Problem, Setting, assert_close

from moe_jax.kernels import Activation
from moe_jax.kernels.device import TPU_DEVICES, targeting
from moe_jax.kernels.expert_parallel import expert_parallel_moe, explain_expert_parallel_moe


def draw(rng, setting, **shape):
    problem = Problem.draw(rng, setting, **shape)
    ids = np.asarray(problem.arrays["topk_ids"]).copy()
    ids[0], ids[1, 0] = -1, ids[1, 1]  # a token without experts, and one that names an expert twice
    return problem.routed(ids)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_implementations_compute_the_same(implementation, rng):
    setting = Setting(4, Activation("gelu_tanh"), apply_router_weight_on_input=True, implementation=implementation)
    problem = draw(rng, setting, hidden=20, intermediate=12, bias=True)
    problem.assert_right(problem.run()[0])


def check_gradients(rng, setting, **shape):
    problem = draw(rng, setting, bias=True, **shape)
    finite = {name: jnp.nan_to_num(problem.arrays[name], nan=0.5) for name in ("x", "topk_weights")}
    problem = dataclasses.replace(problem, arrays={**problem.arrays, **finite})
    cotangent = jnp.array(rng.normal(size=problem.arrays["x"].shape), jnp.float32)
    gradients, result = problem.gradients(cotangent)
    problem.assert_right(result)
    expected = problem.expected_gradients(cotangent)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], gradient.dtype)


def test_gradients_of_tokens_and_weights_on_every_rank(rng):
    check_gradients(rng, Setting(4, implementation="xla"), hidden=20, intermediate=12)


@pytest.mark.slow
@pytest.mark.parametrize("on_input", [False, True])
def test_gradients_of_the_kernel(on_input, rng):
    check_gradients(rng, Setting(2, apply_router_weight_on_input=on_input))


def test_the_gradient_of_the_kernel_gathers_tokens_and_keeps_dtypes(rng):
    problem = Problem.draw(rng, Setting(4), bias=True, dtype=jnp.bfloat16)
    floating = {name: array for name, array in problem.arrays.items() if name != "topk_ids"}

    def loss(floating):
        return problem.setting.sharded()({**floating, "topk_ids": problem.arrays["topk_ids"]}).astype(jnp.float32).sum()

    with targeting(TPU_DEVICES["v6e"]):
        program, shapes = jax.make_jaxpr(jax.grad(loss), return_shape=True)(floating)
    assert {name: (shape.shape, shape.dtype) for name, shape in shapes.items()} == {
        name: (array.shape, array.dtype) for name, array in floating.items()
    }
    assert "all_gather" in str(program)


def arguments(tokens=16, hidden=256, intermediate=128, experts=4, top_k=2, dtype=jnp.bfloat16):
    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    pairs = (tokens, top_k)
    weights = shape(experts, 2, intermediate, hidden), shape(experts, hidden, intermediate)
    return shape(tokens, hidden), shape(*pairs, dtype=jnp.float32), shape(*pairs, dtype=jnp.int32), *weights


def test_the_choice_names_tiles_and_bytes():
    with targeting(TPU_DEVICES["v6e"]):
        choice = explain_expert_parallel_moe(*arguments(), num_ranks=4)
    assert choice.implementation == "pallas_tpu"
    # 32 pairs and 15 rows of padding for each of 16 experts, rounded down to 16; and from each of 4 ranks, for 4 experts
    assert f"rows sent {(32 + 15 * 16) // 16 * 16 * 512 / 2**20:.4g} MiB" in choice.formulation
    assert f"rows received {4 * ((32 + 15 * 4) // 16 * 16) * 512 / 2**20:.4g} MiB" in choice.formulation
    assert explain_expert_parallel_moe(*arguments(), num_ranks=4).implementation == "xla"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(hidden=192), "H must be a positive multiple of 128, for copies to other chips, got 192"),
        (dict(intermediate=64), "I must be a positive multiple of 128, for copies to other chips, got 64"),
        (dict(dtype=jnp.float16), "operands must be bfloat16 or float32, got float16"),
    ],
    ids=["H", "I", "dtype"],
)
def test_what_the_kernel_cannot_do_is_said(changed, reason):
    with targeting(TPU_DEVICES["v6e"]):
        choice = explain_expert_parallel_moe(*arguments(**changed), num_ranks=4)
        assert dict(choice.rejected)["pallas_tpu"] == reason
        with pytest.raises(NotImplementedError, match=reason):
            explain_expert_parallel_moe(*arguments(**changed), num_ranks=4, implementation="pallas_tpu")


@pytest.mark.parametrize(("name", "value"), [("num_ranks", 0), ("collective_id", -1)])
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*got {value}"):
        explain_expert_parallel_moe(*arguments(), **{"num_ranks": 4, name: value})


def test_the_experts_of_one_of_several_layers_are_read_from_their_stack_and_get_its_gradient(rng):
    problem = Problem.draw(rng, Setting(4, implementation="xla"), hidden=20, intermediate=12, bias=True)
    names = ("gate_up_proj", "down_proj")
    stacks = {name: jnp.stack([jnp.zeros_like(problem.arrays[name]), problem.arrays[name]]) for name in names}
    tokens, experts, layers = PartitionSpec("expert"), PartitionSpec("expert"), PartitionSpec(None, "expert")
    others = {name: array for name, array in problem.arrays.items() if name not in names}
    specs = {name: experts if "bias" in name else tokens for name in others}

    @functools.partial(
        jax.shard_map,
        mesh=problem.setting.mesh(),
        in_specs=(dict.fromkeys(names, layers), specs),
        out_specs=tokens,
        check_vma=False,
    )
    def of_second_layer(stacks, others):
        return expert_parallel_moe(**stacks, **others, axis="expert", layer=jnp.int32(1), implementation="xla")

    cotangent = jnp.array(rng.normal(size=problem.arrays["x"].shape), jnp.float32)
    gradients = jax.jit(jax.grad(lambda stacks: jnp.vdot(of_second_layer(stacks, others), cotangent)))(stacks)
    problem.assert_right(jax.jit(of_second_layer)(stacks, others))
    expected = problem.expected_gradients(cotangent)
    for name in names:
        assert not gradients[name][0].any()
        assert_close(gradients[name][1], expected[name], jnp.float32)
