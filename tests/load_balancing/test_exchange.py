"""Experts change devices bit by bit as numpy's indexing says, in bounded memory and without compiling twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.load_balancing.exchange import ExpertSharding, fetch_row, jitted_move, move_experts, move_in_place
from moe_jax.parallel.ragged_exchange import emulated_ragged_all_to_all


def make_mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def placed(values, mesh, *spec):
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))


def move(array, source, *, is_stacked):
    sharding = ExpertSharding.of(array, is_stacked=is_stacked)
    (result,) = move_in_place((array,), (jnp.asarray(source, jnp.int32),), shardings=(sharding,))
    return result


# mesh, spec, shape: [P, ...] or [L, P, ...]
LAYOUTS = {
    "one layer over 8 ranks": ({"expert": 8}, ("expert",), (16, 3)),
    "stacked layers over 4 ranks": ({"expert": 4}, (None, "expert"), (3, 8, 2, 5)),
    "tensor slices": ({"expert": 2, "tensor": 2}, ("expert", None, "tensor"), (6, 2, 4, 3)),
    "experts over two axes": ({"data": 2, "tensor": 2}, (("data", "tensor"), None), (8, 5)),
    "experts on every rank": ({"expert": 2}, (), (6, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moved_experts_are_those_that_indexing_gives(layout, rng):
    sizes, spec, shape = LAYOUTS[layout]
    is_stacked = spec[:1] == (None,)
    num_layers, num_slots = shape[:2] if is_stacked else (1, shape[0])
    values = rng.normal(size=shape).astype(np.float32)
    source = rng.integers(num_slots, size=(num_layers, num_slots))
    array = placed(values, make_mesh(**sizes), *spec)
    sharding = array.sharding
    expected = (
        np.stack([values[layer][source[layer]] for layer in range(num_layers)]) if is_stacked else values[source[0]]
    )
    result = move(array, source, is_stacked=is_stacked)
    np.testing.assert_array_equal(result, expected)
    assert result.sharding.is_equivalent_to(sharding, result.ndim)
    assert array.is_deleted()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float32, jnp.float64])
def test_every_bit_arrives(dtype, rng):
    """Negative zeros and numbers that are none, too, which a sum of numbers would change."""
    with jax.enable_x64(dtype == jnp.float64):
        check_every_bit(dtype, rng)


def check_every_bit(dtype, rng):
    bits = rng.integers(256, size=(8, 16), dtype=np.uint8)
    bits[0, :2] = [0, 128]  # -0.0 in bfloat16
    values = bits.view(dtype)
    source = rng.permutation(8)[None]
    result = np.asarray(move(placed(values, make_mesh(expert=4), "expert"), source, is_stacked=False))
    np.testing.assert_array_equal(result.view(np.uint8), bits[source[0]])


def test_what_accelerators_are_told_fetches_the_same_rows(rng, monkeypatch):
    """The offsets and sizes of the collective that CPUs lack: executed by its emulation, and checked to agree between ranks."""
    ranks, slots = 4, 3

    def checked(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        agreed = (jax.lax.all_to_all(send_sizes, axis_name, 0, 0, tiled=True) == recv_sizes).all()
        blocks = (input_offsets, send_sizes, output_offsets, recv_sizes)
        result = emulated_ragged_all_to_all(operand, output, *blocks, axis_name=axis_name)
        return jnp.where(agreed, result, jnp.nan)

    def fetch(local, wanted):
        rank = jax.lax.axis_index("expert")
        row = jax.lax.dynamic_slice_in_dim(local, wanted[rank] % slots, 1)
        tables = jnp.divmod(wanted, slots)
        return fetch_row(local, row, *tables, rank, axes=("expert",), platform="tpu")

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", checked)
    specs = (PartitionSpec("expert"), PartitionSpec())
    on_ranks = jax.shard_map(fetch, mesh=make_mesh(expert=ranks), in_specs=specs, out_specs=specs[0], check_vma=False)
    values = jnp.asarray(rng.normal(size=(ranks * slots, 2)), jnp.float32)
    own = np.arange(ranks) * slots  # a row of each rank itself
    for wanted in (rng.integers(ranks * slots, size=ranks), np.full(ranks, slots + 1), own):
        np.testing.assert_array_equal(jax.jit(on_ranks)(values, jnp.asarray(wanted, jnp.int32)), values[wanted])


def test_experts_move_on_one_device(rng):
    values = rng.normal(size=(2, 5, 3)).astype(np.float32)
    source = rng.integers(5, size=(2, 5))
    result = move(jnp.array(values), source, is_stacked=True)
    np.testing.assert_array_equal(result, np.take_along_axis(values, source[..., None], axis=1))


def test_moving_needs_memory_for_one_layers_local_experts_and_few_rows():
    """Not for all experts, as a gather would. One row is the collective's, three its emulation's on CPUs."""
    num_layers, num_ranks, slots, width = 3, 8, 16, 8192
    spec = PartitionSpec(None, "expert")
    mesh = make_mesh(expert=num_ranks)
    shape = (num_layers, num_ranks * slots, width)
    experts = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    source = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    sharding = ExpertSharding(mesh, spec, is_stacked=True)
    memory = jitted_move((sharding,), (experts.format,)).lower((experts,), (source,)).compile().memory_analysis()
    row = 4 * width
    assert memory.alias_size_in_bytes == num_layers * slots * row  # the result takes the place of the argument
    assert memory.temp_size_in_bytes <= (slots + 4) * row
    gather = jax.jit(lambda experts, source: jnp.take_along_axis(experts, source[..., None], axis=1), donate_argnums=0)
    assert gather.lower(experts, source).compile().memory_analysis().temp_size_in_bytes > num_ranks * slots * row


def test_another_placement_does_not_trace_again(rng):
    traces = []
    mesh = make_mesh(expert=4)
    sharding = ExpertSharding(mesh, PartitionSpec("expert"), is_stacked=False)

    @jax.jit
    def run(experts, source):
        traces.append(1)
        return move_experts(experts, source, sharding=sharding)

    values = rng.normal(size=(8, 3)).astype(np.float32)
    array = placed(values, mesh, "expert")
    for _ in range(3):
        source = rng.integers(8, size=(1, 8))
        np.testing.assert_array_equal(run(array, source), values[source[0]])
    assert len(traces) == 1
