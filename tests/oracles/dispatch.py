"""How many rows each rank sends to others, counted token by token from ids and placement."""

import numpy as np


def count_sent_rows(physical_ids, axes, config):
    """Rows that each rank with tokens of its own sends to other ranks' experts.

    Args:
        physical_ids: `[T, K]` numpy.
        axes: the layer's axes; only their sizes and names are looked at.
        config: strategy and options in its `parallel`.
    """
    parallel, mesh = config.parallel, dict(axes.mesh.shape)
    strategy = parallel.strategy
    token_axes = list(axes.data + axes.sequence)
    if strategy not in ("replicated", "allgather_reducescatter"):
        token_axes += [name for name in axes.expert if name not in token_axes]
    positions = list(np.ndindex(*(mesh[name] for name in token_axes)))
    halves = parallel.micro_batches
    per_rank = -(-len(physical_ids) // (len(positions) * halves)) * halves
    if strategy == "replicated":
        return [0] * len(positions)
    if strategy == "allgather_reducescatter":
        others = np.prod([mesh[name] for name in axes.expert + axes.tensor if name in token_axes], dtype=int) - 1
        return [per_rank * others] * len(positions)

    local_experts = config.num_physical_experts // np.prod([mesh[name] for name in axes.expert], dtype=int)
    # Ranks of a tensor axis that hold different tokens first gather them, so each sends those of all.
    gathered = [name for name in axes.tensor if name in token_axes]
    rows_of_own_tokens = {}
    for place, position in enumerate(positions):
        at = dict(zip(token_axes, position, strict=True))
        rank = 0
        for name in axes.expert:
            rank = rank * mesh[name] + at[name]
        rows = 0
        for token in physical_ids[place * per_rank : (place + 1) * per_rank]:
            experts = {int(expert) for expert in token if expert >= 0}
            if parallel.one_row_per_rank:
                rows += len({expert // local_experts for expert in experts} - {rank})
            else:
                rows += sum(expert // local_experts != rank for expert in experts)
        rows_of_own_tokens[position] = rows
    return [
        sum(
            rows
            for other, rows in rows_of_own_tokens.items()
            if all(a == b for name, a, b in zip(token_axes, position, other, strict=True) if name not in gathered)
        )
        for position in positions
    ]
