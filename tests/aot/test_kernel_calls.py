"""Kernels are found wherever they stand in a program, and told apart by what their code depends on."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.aot.kernel_calls import kernel_calls


def scale(x, weights, *, factor=2.0, tile=64):
    """Rows of x, tile by tile, times a number and the first row of weights' first matrix."""
    num_rows, width = x.shape

    def scale_rows(x_gmem, weights_gmem, y_gmem, smem, loaded):
        @pl.loop(0, pl.cdiv(num_rows, tile) // 1000 + 1)
        def _(_):
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(lax.axis_index("block") * tile, tile)], smem, loaded)
            plgpu.barrier_wait(loaded)
            smem[...] = smem[...] * factor
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, y_gmem.at[pl.ds(lax.axis_index("block") * tile, tile)])
            plgpu.wait_smem_to_gmem(0)

    transforms = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        scale_rows,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(4,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((tile, width), x.dtype, transforms=transforms), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, weights)


def arrays(rows=512, width=64):
    return jax.ShapeDtypeStruct((rows, width), jnp.float32), jax.ShapeDtypeStruct((4, 8, width), jnp.float32)


def calls(function, *arguments):
    return kernel_calls(jax.make_jaxpr(function)(*arguments))


def sameness(*, rows=512, width=64, **kwargs):
    (call,) = calls(lambda x, w: scale(x, w, **kwargs), *arrays(rows, width))
    return call.sameness()


def test_name_arrays_and_buffers_are_those_of_the_kernel():
    (call,) = calls(scale, *arrays())
    assert call.name == "scale_rows"
    assert [operand.shape for operand in call.operands] == [(512, 64), (4, 8, 64)]
    assert [(result.shape, result.dtype) for result in call.results] == [((512, 64), jnp.float32)]
    assert call.buffers() == ("float32[64,64]",)


def test_kernels_are_found_inside_jit_loops_conditions_and_custom_gradients():
    @jax.custom_vjp
    def differentiable(x, w):
        return scale(x, w)

    differentiable.defvjp(
        lambda x, w: (scale(x, w, factor=3.0), w), lambda w, g: (scale(g, w, factor=5.0), jnp.zeros_like(w))
    )

    def program(x, w):
        x = jax.jit(scale)(x, w)
        x = lax.fori_loop(0, 3, lambda _, x: scale(x, w), x)
        x = lax.cond(x[0, 0] > 0, lambda x: x, lambda x: scale(x, w), x)
        return jax.grad(lambda x: differentiable(x, w).sum())(x)

    assert len(calls(program, *arrays())) == 5
    assert calls(lambda x, w: x @ w[0].T, *arrays()) == ()


def test_calls_that_differ_in_rows_only_are_the_same():
    assert sameness(rows=512) == sameness(rows=8192) == sameness(rows=64)


@pytest.mark.parametrize("kwargs", [{"factor": 3.0}, {"tile": 128}, {"width": 128}], ids=str)
def test_calls_whose_code_differs_are_not_the_same(kwargs):
    assert sameness() != sameness(**kwargs)


def test_numbers_of_rows_that_are_in_the_code_make_a_difference():
    assert sameness(rows=512) != sameness(rows=64 * 2000)
