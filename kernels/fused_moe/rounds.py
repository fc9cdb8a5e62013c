"""Rounds: memory for as many rows as are expected, where most choices name experts of other ranks.

A rank that is given the tokens of all ranks computes few of their choices, but how many isn't known when a program is compiled.
With room for all, rows of other ranks' experts are gathered in vain, and most of the memory is never used. With room for about
as many as are expected, what doesn't fit is computed in further rounds, a loop of as many as it takes; nothing is dropped.
"""

import math

from .request import Request

_USUAL_FACTOR = 1.25
"""Room for what evenly spread choices bring, and for chance."""
_ROWS_WORTH_A_ROUND = 512
"""Rows of each expert for which there is room in any case. Reading an expert's weights takes as long as multiplying 150 to 560 rows
in bfloat16, by published peaks (A100, v6e): with fewer, another round costs as much as the one before."""
LEAST_BYTES_SAVED = {"gpu": 2**32, "tpu": 2**30}
"""By platform: so much less memory for gathered rows is worth a loop, for which kernels are compiled twice, and whose gradient adds
up those of weights in float32. On a GPU the host waits for the number of rounds, so there it is for calls that might not fit."""


def rows_worth_a_round(expected_rows: float, num_experts: int) -> float:
    """Rows for which a round had better have room, if so many are expected for the experts of a rank."""
    return max(_USUAL_FACTOR * expected_rows, _ROWS_WORTH_A_ROUND * num_experts)


def rows_per_round(request: Request, platform: str) -> int | None:
    """How many rows are computed at once, from static shapes alone; None: all, without a loop."""
    num_pairs = request.topk_ids.size
    num_rows = math.ceil(rows_worth_a_round(request.expected_rows, request.num_experts))
    saved_bytes = (num_pairs - num_rows) * request.hidden_size * request.x.dtype.itemsize
    return num_rows if saved_bytes >= LEAST_BYTES_SAVED[platform] else None
