"""Rounds: memory for as many rows as are expected, where most choices name experts of other ranks.

A rank that is given the tokens of all ranks computes few of their choices, but how many isn't known when a program is compiled.
With room for all, rows of other ranks' experts are gathered in vain, and most of the memory is never used. With room for about
as many as are expected, what doesn't fit is computed in further rounds, a loop of as many as it takes; nothing is dropped.
"""

import math
from typing import NamedTuple, Self

from ..sum_of_rounds import rows_worth_a_round
from .request import Request

LEAST_BYTES_SAVED = {"gpu": 2**32, "tpu": 2**26}
"""By platform: so much less memory for gathered rows is worth a loop, for which kernels are compiled twice. On a GPU the host waits
for the number of rounds, so there it is for calls that might not fit."""
LEAST_BYTES_SAVED_WITH_GRADIENT = {"gpu": 2**32, "tpu": 2**30}
"""The same with a gradient, which adds up those of weights in float32, all of them in each round."""


class RowsPerRound(NamedTuple):
    """How many rows are computed at once, from static shapes alone; None: all, without a loop."""

    without_gradient: int | None
    """Rows are sorted by expert: a round begins with the last one's expert, and reads no other weights anew."""
    with_gradient: int | None
    """Each round adds the gradients of all weights, so there had better be few."""

    @classmethod
    def of(cls, request: Request, platform: str) -> Self:
        """For a request, on "gpu" or "tpu"."""

        def rows(num_experts: int, least_bytes: int) -> int | None:
            num_rows = math.ceil(rows_worth_a_round(request.expected_rows, num_experts))
            saved_bytes = (request.topk_ids.size - num_rows) * request.hidden_size * request.x.dtype.itemsize
            return num_rows if saved_bytes >= least_bytes else None

        return cls(
            rows(1, LEAST_BYTES_SAVED[platform]), rows(request.num_experts, LEAST_BYTES_SAVED_WITH_GRADIENT[platform])
        )

    def __str__(self) -> str:
        """As in "in rounds of 1280 rows, for a gradient of all"; empty if there are none."""
        if self == (None, None):
            return ""
        without, with_gradient = ("all rows" if rows is None else f"{rows} rows" for rows in self)
        return f"in rounds of {without}" + ("" if without == with_gradient else f", for a gradient of {with_gradient}")
