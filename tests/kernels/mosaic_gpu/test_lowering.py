"""What the kernels are said to support can be lowered for Hopper, which refuses layouts that interpret mode accepts.

Lowering ends before the compilers of CUDA, so it needs neither them nor a GPU.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import launch_context, utils

from moe_jax.aot.targets import GpuTarget
from moe_jax.kernels import fused_moe, grouped_matmul

HOPPER = GpuTarget.named("h200")


def lower(function, *arguments):
    """The text of the lowered function, and of its backward pass with it."""

    def forward_and_backward(*arguments):
        result, backward = jax.vjp(function, *arguments)
        return result, backward(result)

    with HOPPER.lowering():
        traced = jax.jit(forward_and_backward).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "function",
    [utils.commit_shared, launch_context.LaunchContext.await_async_copy],
    ids=lambda function: function.__name__,
)
def test_kernels_without_automatic_barriers_find_those_that_they_rely_on(function):
    """That committing stores and waiting for them each end with a barrier is nowhere promised; see `compiler_params.py`."""
    assert "warpgroup_barrier()" in inspect.getsource(function)


def count_kernels(text):
    return text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("num_rows", [20, 1004])
def test_a_grouped_matmul_of_any_number_of_rows_and_its_gradients_can_be_lowered(num_rows):
    rows = jax.ShapeDtypeStruct((num_rows, 128), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((4, 256, 128), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    multiply = functools.partial(grouped_matmul, implementation="pallas_gpu")
    assert count_kernels(lower(multiply, rows, weights, sizes)) == 3


def test_few_rows_of_a_narrow_grouped_matmul_have_float32_results():
    shapes = ((648, 32), jnp.bfloat16), ((64, 1760, 32), jnp.bfloat16), ((64,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    float32 = functools.partial(grouped_matmul, implementation="pallas_gpu", preferred_element_type=jnp.float32)
    assert count_kernels(lower(float32, *arguments)) == 3


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"),
    [
        (2880, 1440),
        (48, 16),
        pytest.param(2048, 96, marks=pytest.mark.slow),
        pytest.param(96, 96, marks=pytest.mark.slow),
    ],
)
def test_a_fused_moe_of_any_multiples_of_16_and_its_gradients_can_be_lowered(hidden_size, intermediate_size):
    E, H, I, T, K = 4, hidden_size, intermediate_size, 64, 2  # noqa: E741
    x, gate_up_proj, down_proj = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((T, H), (E, 2, I, H), (E, H, I))
    )
    topk_weights = jax.ShapeDtypeStruct((T, K), jnp.float32)

    def block(x, topk_weights, gate_up_proj, down_proj):
        topk_ids = jnp.zeros((T, K), jnp.int32)
        return fused_moe(x, topk_weights, topk_ids, gate_up_proj, down_proj, implementation="pallas_gpu")

    assert count_kernels(lower(block, x, topk_weights, gate_up_proj, down_proj)) == 6


@pytest.mark.parametrize("num_rows", [20, 1004])
def test_kernels_can_be_lowered_where_integers_have_64_bits(num_rows):
    """Their interpreter does not work there."""
    rows = jax.ShapeDtypeStruct((num_rows, 128), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((4, 256, 128), jnp.bfloat16)
    multiply = functools.partial(grouped_matmul, implementation="pallas_gpu")

    with jax.enable_x64(True):
        assert count_kernels(lower(multiply, rows, weights, jax.ShapeDtypeStruct((4,), jnp.int64))) == 3
