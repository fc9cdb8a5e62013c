"""What goes where, against copies that a walk over all ranks makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.expert_parallel.exchange import Exchange, SentBlocks, most_rows_received, most_rows_sent

exchange_of = jax.jit(Exchange.of)
sent_blocks_of = jax.jit(SentBlocks.of, static_argnums=1)


@pytest.mark.parametrize("num_ranks", [1, 5])
def test_blocks_land_by_expert_and_source_and_results_return_to_the_rows_that_were_sent(num_ranks, rng):
    num_local = 3
    block_rows = 16 * rng.integers(0, 4, size=(num_ranks, num_ranks * num_local))
    block_rows[rng.random(block_rows.shape) < 0.3] = 0
    ranks = [exchange_of(jnp.array(block_rows, jnp.int32), rank) for rank in range(num_ranks)]
    ranks = [Exchange(*(np.asarray(table) for table in rank)) for rank in ranks]
    for source, exchange in enumerate(ranks):
        np.testing.assert_array_equal(exchange.send_rows, block_rows[source])
        np.testing.assert_array_equal(exchange.send_start, np.cumsum(block_rows[source]) - block_rows[source])
    for owner, exchange in enumerate(ranks):
        next_row = 0
        for local in range(num_local):
            expert = owner * num_local + local
            for source in range(num_ranks):
                assert exchange.receive_rows[local, source] == block_rows[source, expert]
                assert exchange.receive_start[local, source] == ranks[source].send_target[expert] == next_row
                assert exchange.return_target[local, source] == ranks[source].send_start[expert]
                next_row += block_rows[source, expert]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (7, 3, 12), (33, 4, 2)])
def test_every_pair_with_an_expert_is_sent_once_in_the_block_of_its_expert(tokens, top_k, experts, rng):
    ids = rng.integers(-2, experts + 2, size=(tokens, top_k))
    sent = SentBlocks(*(np.asarray(field) for field in sent_blocks_of(jnp.array(ids, jnp.int32), experts)))
    legal = (ids >= 0) & (ids < experts)
    np.testing.assert_array_equal(sent.has_expert, legal)
    counts = np.bincount(ids[legal], minlength=experts)
    np.testing.assert_array_equal(sent.block_rows, -(-counts // 16) * 16)
    assert sent.block_rows.sum() <= len(sent.token) == most_rows_sent(tokens * top_k, experts)
    ends = np.cumsum(sent.block_rows)
    assert len(set(sent.position[legal])) == legal.sum()
    for token, choice in np.argwhere(legal):
        row = sent.position[token, choice]
        assert (sent.token[row], sent.pair[row]) == (token, token * top_k + choice)
        assert np.searchsorted(ends, row, side="right") == ids[token, choice]


@pytest.mark.parametrize(("pairs", "experts"), [(1, 5), (5, 5), (5, 1), (100, 3), (0, 4)])
def test_there_is_room_for_the_worst_routing_and_no_more_than_a_block_above_it(pairs, experts):
    alone = min(pairs, experts - 1)  # one pair for each expert but the last, which gets all others
    worst = 16 * alone + -(-(pairs - alone) // 16) * 16
    assert worst <= most_rows_sent(pairs, experts) <= max(worst, 16) + 16 * alone
    assert most_rows_received(pairs, experts, 4) == 4 * most_rows_sent(pairs, experts)


def test_results_are_summed_in_the_order_of_choices_in_float32(rng):
    ids = jnp.array([[1, 0, -1]])
    sent = sent_blocks_of(ids, 2)
    results = jnp.full((sent.token.shape[0], 1), jnp.nan, jnp.bfloat16)
    results = results.at[sent.position[0, 0]].set(3).at[sent.position[0, 1]].set(5)
    weights = jnp.array([[0.1, 1e-3, jnp.nan]], jnp.float32)
    expected = np.float32(0.1) * np.float32(3) + np.float32(1e-3) * np.float32(5)
    assert sent.combine(results, weights)[0, 0] == pytest.approx(expected, rel=1e-6)
