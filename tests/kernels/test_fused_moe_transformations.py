"""Every implementation of `fused_moe` repeated, scanned, mapped and sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.implementations import UNDER_TEST, each_implementation_with
from support.implementations import each_implementation as each_implementation_of
from support.moe_blocks import Block

from moe_jax.kernels import fused_moe
from moe_jax.kernels.device import targeting
from moe_jax.kernels.fused_moe.api import IMPLEMENTATIONS as MODULES

each_implementation = each_implementation_of(MODULES)
each_implementation_sampled = each_implementation_of(MODULES, sampled=True)


@each_implementation_with(MODULES, "tokens", [20, 100])
def test_repeated_calls_give_the_same_bits(implementation, tokens, rng):
    block = Block.draw(rng, implementation, tokens=tokens, experts=5, top_k=4)
    np.testing.assert_array_equal(block.run(), block.run())


@each_implementation
def test_repeated_gradients_are_the_same_bits(implementation, rng):
    block = Block.draw(rng, implementation, tokens=30, experts=3, top_k=3)
    cotangent = block.draw_cotangent(rng)
    first, second = block.gradients(cotangent), block.gradients(cotangent)
    for name, gradient in first.items():
        np.testing.assert_array_equal(gradient, second[name])


@each_implementation
def test_scan_over_stacked_layers(implementation, rng):
    blocks = [Block.draw(rng, implementation, tokens=12) for _ in range(3)]
    names = ("gate_up_proj", "down_proj", "topk_ids")
    stacked = {name: jnp.stack([block.arrays[name] for block in blocks]) for name in names}
    weights = blocks[0].arrays["topk_weights"]

    @jax.jit
    def scanned(x):
        def layer(x, parameters):
            result = fused_moe(x, weights, implementation=implementation.name, **parameters)
            return result, result

        return jax.lax.scan(layer, x, stacked)[1]

    x = blocks[0].arrays["x"]
    with implementation.running():
        results = scanned(x)
    for block, result in zip(blocks, results, strict=True):
        # From the rounded result of the layer before it: errors would grow from layer to layer.
        block = block.with_arrays(x=x, topk_weights=weights)
        block.assert_close(result, block.expected())
        x = result


@each_implementation
def test_vmap_is_the_same_as_a_loop(implementation, rng):
    blocks = [Block.draw(rng, implementation, tokens=9) for _ in range(3)]
    stacked = {name: jnp.stack([block.arrays[name] for block in blocks]) for name in blocks[0].arrays}
    with implementation.running():
        result = jax.jit(jax.vmap(lambda arrays: fused_moe(**arrays, implementation=implementation.name)))(stacked)
    for row, block in zip(result, blocks, strict=True):
        block.assert_close(row, block.expected())


SHARDED_NAMES = ("topk_ids", "x", "topk_weights", "gate_up_proj", "down_proj")


def sharded_block(implementation, mesh_shape, check_vma):
    """The block with tokens split over one axis of a mesh, and its 6 experts over the other."""
    mesh = jax.make_mesh(mesh_shape, ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(ids, x, weights, gate_up_proj, down_proj):
        offset = jax.lax.axis_index("expert") * (6 // mesh_shape[1])
        part = fused_moe(
            x, weights, ids, gate_up_proj, down_proj, expert_offset=offset, implementation=implementation.name
        )
        return jax.lax.psum(part, "expert")

    by_token, by_expert = P("data"), P("expert")
    in_specs = (by_token, by_token, by_token, by_expert, by_expert)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=by_token, check_vma=check_vma)


def loss_and_result(sharded, cotangent, ids, *floating):
    result = sharded(ids, *floating)
    return jnp.vdot(result, cotangent, preferred_element_type=jnp.float32), result


@each_implementation_with(MODULES, "check_vma", [True, False], left_out=[True])
def test_experts_sharded_with_shard_map_are_the_unsharded_block(implementation, check_vma, rng):
    block = Block.draw(rng, implementation, tokens=14, experts=6)
    cotangent = block.draw_cotangent(rng)
    sharded = sharded_block(implementation, (2, 2) if implementation.runs_on_meshes else (1, 1), check_vma)
    function = functools.partial(loss_and_result, sharded, cotangent)
    with implementation.running():
        actual, result = jax.jit(jax.grad(function, argnums=(1, 2, 3, 4), has_aux=True))(
            *(block.arrays[name] for name in SHARDED_NAMES)
        )
    block.assert_close(result, block.expected())
    block.assert_gradients_right(dict(zip(SHARDED_NAMES[1:], actual, strict=True)), cotangent)


@each_implementation_sampled
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_trace_inside_shard_map_over_several_devices(implementation, check_vma, rng):
    block = Block.draw(rng, implementation, tokens=14, experts=6)
    function = functools.partial(
        loss_and_result, sharded_block(implementation, (2, 2), check_vma), block.draw_cotangent(rng)
    )
    arrays = [block.arrays[name] for name in SHARDED_NAMES]
    with targeting(implementation.target):
        gradients, result = jax.eval_shape(jax.grad(function, argnums=(1, 2, 3, 4), has_aux=True), *arrays)
    assert result.shape == block.arrays["x"].shape
    assert [gradient.shape for gradient in gradients] == [array.shape for array in arrays[1:]]


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_decides_for_its_own_rows_how_many_slots_experts_get(check_vma, rng):
    """200 tokens on each of two devices: one routes evenly, the other sends most of them to one expert."""
    implementation = UNDER_TEST["xla"]
    block = Block.draw(rng, implementation, tokens=400, experts=6, top_k=2)
    skewed = (jnp.arange(400) >= 200)[:, None] & (jnp.arange(2) == 0)
    block = block.with_arrays(topk_ids=jnp.where(skewed, 5, block.arrays["topk_ids"] % 5))
    function = jax.jit(sharded_block(implementation, (2, 2), check_vma))
    block.assert_close(function(*(block.arrays[name] for name in SHARDED_NAMES)), block.expected())


def test_vmap_computes_what_each_element_would_with_slots_of_its_own(rng):
    blocks = [Block.draw(rng, UNDER_TEST["xla"], tokens=150, experts=4, top_k=2) for _ in range(2)]
    hot = blocks[1].arrays["topk_ids"].at[:140, 0].set(3).at[:140, 1].set(0)
    blocks[1] = blocks[1].with_arrays(topk_ids=hot)
    stacked = {name: jnp.stack([block.arrays[name] for block in blocks]) for name in blocks[0].arrays}
    result = jax.jit(jax.vmap(lambda arrays: fused_moe(**arrays, implementation="xla")))(stacked)
    for row, block in zip(result, blocks, strict=True):
        block.assert_close(row, block.expected())


@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_replicated_tokens_and_weights_need_not_vary_where_the_offset_of_experts_does(tokens, rng):
    block = Block.draw(rng, UNDER_TEST["xla"], tokens=tokens, experts=2, top_k=2)
    ids = rng.integers(0, 4, (tokens, 2))
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(arrays):
        offset = jax.lax.axis_index("expert") * 2
        return jax.lax.psum(fused_moe(**arrays, expert_offset=offset, implementation="xla"), "expert")

    arrays = block.arrays | {"topk_ids": jnp.asarray(ids, jnp.int32)}
    result = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P()))(arrays)
    # Both devices hold the same two experts, as 0 and 1 and as 2 and 3.
    block.assert_close(result, block.with_arrays(topk_ids=jnp.asarray(ids % 2, jnp.int32)).expected())


@pytest.mark.parametrize("tokens", [9, 64])
def test_gradients_of_replicated_arrays_add_up_where_the_offset_of_experts_varies(tokens, rng):
    block = Block.draw(rng, UNDER_TEST["xla"], tokens=tokens, experts=4, top_k=2)
    cotangent = block.draw_cotangent(rng)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    ids = block.arrays["topk_ids"]
    floating = {name: array for name, array in block.arrays.items() if name != "topk_ids"}

    def loss(floating):
        def local(floating):
            first = jax.lax.axis_index("expert") * 2
            own = floating | {
                name: jax.lax.dynamic_slice_in_dim(floating[name], first, 2) for name in ("gate_up_proj", "down_proj")
            }
            result = fused_moe(**own, topk_ids=ids, expert_offset=first, implementation="xla")
            return jax.lax.psum(result, "expert")

        return jnp.vdot(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P())(floating), cotangent)

    gradients, expected = jax.jit(jax.grad(loss))(floating), block.gradients(cotangent)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())


def test_small_ids_of_few_bits_meet_a_large_offset(rng):
    block = Block.draw(rng, UNDER_TEST["xla"], tokens=9, experts=4, top_k=2)
    ids = jnp.asarray(rng.integers(0, 101, (9, 2)), jnp.int8)
    for implementation in ("xla", "reference"):
        arrays = block.arrays | {"topk_ids": ids}
        np.testing.assert_array_equal(fused_moe(**arrays, expert_offset=150, implementation=implementation), 0)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (9, 30), (200, 4)])
def test_numpy_arrays_are_computed_like_those_of_jax_without_jit(tokens, experts, rng):
    block = Block.draw(rng, UNDER_TEST["xla"], tokens=tokens, experts=experts, top_k=2)
    arrays = {name: np.asarray(array) for name, array in block.arrays.items()}
    block.assert_close(fused_moe(**arrays, implementation="xla"), block.expected())


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (9, 30), (200, 4)])
def test_float64_is_computed_in_float64_where_integers_have_64_bits_too(tokens, experts, rng):
    with jax.enable_x64(True):
        block = Block.draw(rng, UNDER_TEST["xla"], tokens=tokens, experts=experts, top_k=2, bias=True)
        names = [name for name in block.arrays if name != "topk_ids"]
        doubles = {name: jnp.asarray(rng.standard_normal(block.arrays[name].shape)) for name in names}
        block = block.with_arrays(**doubles, topk_ids=block.arrays["topk_ids"].astype(jnp.int64))
        result = jax.jit(lambda arrays: fused_moe(**arrays, implementation="xla"))(block.arrays)
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, block.expected(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [pytest.param(9, marks=pytest.mark.slow), 60])
def test_tpu_kernels_compute_the_same_where_integers_have_64_bits(tokens, rng):
    with jax.enable_x64(True):
        block = Block.draw(rng, UNDER_TEST["pallas_tpu"], tokens=tokens, experts=4, top_k=2, bias=True)
        block = block.with_arrays(topk_ids=block.arrays["topk_ids"].astype(jnp.int64))
        block.assert_right()
        cotangent = block.draw_cotangent(rng)
        block.assert_gradients_right(block.gradients(cotangent), cotangent)
