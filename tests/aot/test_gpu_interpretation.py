"""Interpreting a kernel in tests fails if the kernel has a race, and leaves nothing behind for the next one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from support.gpu_interpretation import interpreting

from moe_jax.kernels.device import GPU_DEVICES, gpu_device_of

SHAPE = (8, 128)
WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def copy(x, *, awaits_load=True, commits=True, awaits_store=True):
    """A copy of x through shared memory, with any of its three synchronisations left out."""

    def body(x_gmem, y_gmem, x_smem, y_smem, loaded):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, loaded)
        if awaits_load:
            plgpu.barrier_wait(loaded)
        y_smem[...] = x_smem[...] * 2
        if commits:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_gmem)
        if not awaits_store:
            y_smem[...] = x_smem[...]
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(SHAPE, x.dtype),
        scratch_types=[plgpu.SMEM(SHAPE, x.dtype), plgpu.SMEM(SHAPE, x.dtype), plgpu.Barrier()],
        compiler_params=WARPGROUP,
    )(x)


def hand_over(x, *, consumer_waits):
    """One warpgroup fills shared memory, the other stores what it finds there."""

    def body(x_gmem, y_gmem, x_smem, loaded, filled):
        def produce():
            plgpu.copy_gmem_to_smem(x_gmem, x_smem, loaded)
            plgpu.barrier_wait(loaded)
            plgpu.barrier_arrive(filled)

        def consume():
            if consumer_waits:
                plgpu.barrier_wait(filled)
            y_gmem[...] = x_smem[...] * 2

        lax.cond(lax.axis_index("warpgroup") == 0, produce, consume)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(SHAPE, x.dtype),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM(SHAPE, x.dtype), plgpu.Barrier(), plgpu.Barrier()],
        compiler_params=WARPGROUP,
    )(x)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)


RACES = {
    "load not awaited": lambda x: copy(x, awaits_load=False),
    "store before commit": lambda x: copy(x, commits=False),
    "overwritten while being stored": lambda x: copy(x, awaits_store=False),
    "read before the other warpgroup has written": lambda x: hand_over(x, consumer_waits=False),
}


@pytest.mark.parametrize("kernel", [copy, lambda x: hand_over(x, consumer_waits=True)], ids=["copy", "hand over"])
def test_kernels_without_races_compute_their_result(kernel, x):
    with interpreting() as interpretation:
        y = kernel(x)
    np.testing.assert_array_equal(y, 2 * x)
    assert interpretation.num_kernels == 1


@pytest.mark.parametrize("racing", RACES.values(), ids=RACES.keys())
def test_planted_race_fails(racing, x):
    with pytest.raises((AssertionError, RuntimeError), match=r"had a race|RACE DETECTED"), interpreting():
        racing(x).block_until_ready()


@pytest.mark.parametrize("jit", [False, True])
def test_race_is_noticed_though_a_right_kernel_ran_after_it_and_nobody_waited(jit, x):
    both = lambda x: copy(copy(x, awaits_load=False))  # noqa: E731
    with pytest.raises((AssertionError, RuntimeError), match=r"had a race|RACE DETECTED"), interpreting():
        (jax.jit(both) if jit else both)(x)


def test_kernels_are_interpreted_after_one_that_failed(x):
    with pytest.raises(ZeroDivisionError), interpreting():
        copy(1 / 0)
    with pytest.raises((AssertionError, RuntimeError)), interpreting():
        copy(x, awaits_load=False)
    with interpreting():
        y = copy(x)
    np.testing.assert_array_equal(y, 2 * x)


def test_kernels_are_built_for_the_named_device_with_the_given_number_of_multiprocessors(x):
    with interpreting(multiprocessors=5, device="b200"):
        named = gpu_device_of(x)
    assert (named.name, named.multiprocessors) == ("b200", 5)
    assert named.shared_memory_bytes == GPU_DEVICES["b200"].shared_memory_bytes
    assert gpu_device_of(x) is None
