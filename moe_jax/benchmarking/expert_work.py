"""Routings to measure with, and the work that the experts then must do: counted on the host, before any device time."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.kernels.activations import Activation

Routing = Literal["uniform", "zipf"]
ROUTINGS: tuple[Routing, ...] = ("uniform", "zipf")


def draw_topk_ids(
    rng: np.random.Generator, shape: ExpertShape, tokens: int, routing: Routing
) -> Int[np.ndarray, "T K"]:
    """K different experts for each token, of all `num_experts`; ids beyond the local ones belong to other ranks.

    "uniform": every expert is as likely as any other. "zipf": the expert that is the r-th most popular is chosen in
    proportion to 1/r, who is popular being random.
    """
    popularity = np.zeros(shape.num_experts)
    if routing == "zipf":
        popularity = rng.permutation(-np.log(np.arange(1, shape.num_experts + 1)))
    # The K largest of Gumbel noise plus log-probabilities are a sample without replacement.
    scores = popularity.astype(np.float32) + rng.gumbel(size=(tokens, shape.num_experts)).astype(np.float32)
    ids = np.argpartition(-scores, shape.top_k - 1, axis=1)[:, : shape.top_k]
    return ids.astype(np.int32)


def local_group_sizes(shape: ExpertShape, topk_ids: Int[np.ndarray, "T K"]) -> Int[np.ndarray, "E"]:
    """Rows of each local expert."""
    return np.bincount(topk_ids.reshape(-1), minlength=shape.num_experts)[: shape.local_experts]


def matrices_per_expert(activation: Activation) -> int:
    """Gate (if the activation is gated), up and down."""
    return 3 if activation.is_gated else 2


@dataclasses.dataclass(frozen=True)
class ExpertWork:
    """What one forward pass of the experts must do at least."""

    rows: int
    """Pairs of a token and a local expert."""
    flops: int
    """Of the matmuls, 2 per multiply-add, of rows that exist."""
    weight_bytes: int
    """Weights of each expert that has rows, once."""
    bytes: int
    """Those, and every token read and written once."""

    @classmethod
    def of(cls, shape: ExpertShape, group_sizes: Int[np.ndarray, "E"], tokens: int, itemsize: int = 2) -> "ExpertWork":
        """The work for groups of these sizes."""
        rows, touched = int(group_sizes.sum()), int(np.count_nonzero(group_sizes))
        matrix = shape.hidden_size * shape.intermediate_size
        matrices = matrices_per_expert(shape.activation)
        weight_bytes = touched * matrices * matrix * itemsize
        if shape.has_bias:
            biases = (matrices - 1) * shape.intermediate_size + shape.hidden_size
            weight_bytes += touched * biases * itemsize
        return cls(
            rows=rows,
            flops=2 * rows * matrices * matrix,
            weight_bytes=weight_bytes,
            bytes=weight_bytes + 2 * tokens * shape.hidden_size * itemsize,
        )


def tile_ceiling(group_sizes: Int[np.ndarray, "E"], tile_rows: int) -> float | None:
    """Largest share of the dense rate that tiles of so many rows allow: rows, over rows of all tiles; None without rows.

    The last tile of each group is partly empty and takes as long as a full one.
    """
    tiles = int(np.sum(-(-group_sizes // tile_rows)))
    return None if tiles == 0 else float(group_sizes.sum()) / (tiles * tile_rows)


def wave_ceiling(tiles: int, multiprocessors: int) -> float | None:
    """Largest share of the dense rate that so many equal tiles allow, each multiprocessor doing one at a time."""
    return None if tiles == 0 else tiles / (-(-tiles // multiprocessors) * multiprocessors)


def sets_to_rotate(bytes_per_call: int, l2_bytes: int, *, fewest: int = 2, most: int = 16) -> int:
    """How many argument sets must take turns so that what a call reads was pushed out of the L2 cache since it was last read.

    Four times the size of the cache lies between two uses.
    """
    return min(most, max(fewest, 1 + -(-4 * l2_bytes // max(bytes_per_call, 1))))
