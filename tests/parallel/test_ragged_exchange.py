"""The ragged exchange: offsets and sizes, and the emulation of the collective on CPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from moe_jax.parallel.ragged_exchange import emulated_ragged_all_to_all, exchange, forth_and_back

SPLIT = PartitionSpec("rank")


def on_ranks(function, num_ranks, *arrays):
    mesh = jax.make_mesh((num_ranks,), ("rank",), (AxisType.Auto,), devices=jax.devices()[:num_ranks])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False))(*arrays)


def test_the_emulation_does_what_the_documentation_of_the_collective_shows():
    # The example of jax.lax.ragged_all_to_all, whose second rank receives rows of both kinds.
    result = on_ranks(
        functools.partial(emulated_ragged_all_to_all, axis_name=("rank",)),
        2,
        jnp.array([1, 2, 2, 3, 4, 0]),
        jnp.zeros(8, int),
        jnp.array([0, 1, 0, 1]),
        jnp.array([1, 2, 1, 1]),
        jnp.array([0, 0, 1, 2]),
        jnp.array([1, 1, 2, 1]),
    )
    assert result.tolist() == [1, 3, 0, 0, 2, 2, 4, 0]


def test_rows_arrive_by_source_return_to_their_places_and_so_do_gradients(rng):
    ranks, room = 4, 9
    sizes = rng.integers(0, 4, size=(ranks, ranks))
    sizes[1], sizes[:, 2] = 0, 0  # one rank sends nothing, and one gets nothing
    sent_room = 3 * ranks
    rows = rng.normal(size=(ranks, sent_room, 2)).astype(np.float32)
    starts = np.cumsum(sizes, axis=1) - sizes
    arrived = np.zeros((ranks, ranks * room, 2), np.float32)
    for receiver in range(ranks):
        blocks = [rows[s, starts[s, receiver] :][: sizes[s, receiver]] for s in range(ranks)]
        joined = np.concatenate(blocks)
        arrived[receiver, : len(joined)] = joined
    returned = np.where(np.arange(sent_room)[None, :, None] < sizes.sum(axis=1)[:, None, None], rows, 0)

    def there_and_back(rows):
        forth, back = forth_and_back(jnp.asarray(sizes), jax.lax.axis_index("rank"))
        there = exchange(rows, forth, back, ranks * room, ("rank",), "cpu")
        here = exchange(there, back, forth, sent_room, ("rank",), "cpu")
        return there, here, jnp.stack([*forth, *back])

    there, here, offsets = on_ranks(there_and_back, ranks, jnp.asarray(rows.reshape(-1, 2)))
    np.testing.assert_array_equal(there, arrived.reshape(-1, 2))
    np.testing.assert_array_equal(here, returned.reshape(-1, 2))
    # What the real collective relies on: each rank is told as many rows as the others say that they send it.
    forth_sent, forth_received, back_sent, back_received = offsets.reshape(ranks, 8, ranks)[:, (1, 3, 5, 7)].swapaxes(
        0, 1
    )
    np.testing.assert_array_equal(forth_received, forth_sent.T)
    np.testing.assert_array_equal(back_received, back_sent.T)

    cotangent = rng.normal(size=(ranks * ranks * room, 2)).astype(np.float32)

    def gradient(rows, cotangent):
        return jax.vjp(lambda rows: there_and_back(rows)[0], rows)[1](cotangent)[0]

    pulled = on_ranks(gradient, ranks, jnp.asarray(rows.reshape(-1, 2)), jnp.asarray(cotangent))
    np.testing.assert_allclose(
        np.vdot(pulled, rows.reshape(-1, 2)), np.vdot(cotangent, arrived.reshape(-1, 2)), rtol=1e-5
    )
