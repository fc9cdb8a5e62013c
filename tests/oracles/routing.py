"""Routing in float64, one token at a time, written from the definitions (spec section 2)."""

from typing import NamedTuple

import numpy as np


class Routed(NamedTuple):
    weights: np.ndarray
    """[T, K] float64"""
    ids: np.ndarray
    """[T, K]"""
    margin: np.ndarray
    """[T]: by how much the closest decision (an expert or a group) was won; float32 may decide otherwise near 0."""


def score(logits: np.ndarray, scoring: str) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    if scoring == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-x))
    return np.sqrt(np.log1p(np.exp(x)))


def best(values, k: int) -> tuple[list[int], float]:
    """Positions of the k largest values, the largest first, among equals the lowest; and the margin of the choice."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    margin = values[order[k - 1]] - values[order[k]] if k < len(values) else np.inf
    return order[:k], margin


def route(
    logits,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    epsilon: float = 0.0,
    bias=None,
    groups: tuple[int, int, str, float] | None = None,
    scale: float = 1.0,
    score_after: bool = False,
    forced_ids=None,
) -> Routed:
    """`groups`: how many, how many are kept, "max" or "top2_sum", what the others score."""
    weights, ids, margins = [], [], []
    for t, row in enumerate(np.asarray(logits, np.float64)):
        scores = row if score_after else score(row, scoring)
        choice = list(scores if bias is None else scores + np.asarray(bias, np.float64))
        margin = np.inf
        if groups is not None:
            count, kept, kind, masked = groups
            size = len(choice) // count
            members = [list(range(g * size, (g + 1) * size)) for g in range(count)]
            group_scores = [
                sum(sorted((choice[e] for e in m), reverse=True)[: 1 if kind == "max" else 2]) for m in members
            ]
            kept_groups, margin = best(group_scores, kept)
            choice = [choice[e] if e // size in kept_groups else masked for e in range(len(choice))]
        if forced_ids is None:
            chosen, expert_margin = best(choice, top_k)
            margin = min(margin, expert_margin)
        else:
            chosen, margin = list(forced_ids[t]), np.inf
        real = [e for e in chosen if e >= 0]
        values = {e: scores[e] for e in real}
        if score_after and real:
            values = dict(zip(real, score(np.array([row[e] for e in real]), scoring), strict=True))
        token = np.array([values[e] if e >= 0 else 0.0 for e in chosen])
        if renormalize:
            total = token.sum() + epsilon
            token = token / (total if total > 0 else 1.0)
        weights.append(token * scale)
        ids.append(chosen)
        margins.append(margin)
    shape = (len(logits), top_k)
    return Routed(np.reshape(weights, shape), np.reshape(np.array(ids, int), shape), np.array(margins))


def sparsemixer(logits, jitter: float) -> Routed:
    weights, ids, margins = [], [], []
    for row in np.asarray(logits, np.float64):
        left = dict(enumerate(row))
        token_weights, token_ids, margin = [], [], np.inf
        for _ in range(2):
            top = max(left.values())
            distance = {e: (top - s) / max(abs(s), top) for e, s in left.items()}
            near = {e: s for e, s in left.items() if distance[e] <= 2 * jitter}
            pick = min(e for e, s in left.items() if s == top)
            token_weights.append(np.exp(top) / sum(np.exp(s) for s in near.values()))
            token_ids.append(pick)
            margin = min(margin, *(abs(d - 2 * jitter) for d in distance.values()))
            del left[pick]
        weights.append(token_weights)
        ids.append(token_ids)
        margins.append(margin)
    return Routed(np.reshape(weights, (-1, 2)), np.reshape(ids, (-1, 2)), np.array(margins))


def sorted_by_id(weights, ids) -> tuple[np.ndarray, np.ndarray]:
    """Both in ascending order of id within each token."""
    order = np.argsort(np.asarray(ids), axis=-1, kind="stable")
    return np.take_along_axis(np.asarray(weights), order, -1), np.take_along_axis(np.asarray(ids), order, -1)


def assert_same_routing(actual, expected: Routed, *, tolerance: float = 1e-5) -> None:
    """The same experts with the same weights, in whatever order, for every token that float32 can decide."""
    decided = expected.margin > 1e-5
    assert decided.mean() > 0.9 or len(decided) == 0, f"only {decided.sum()} of {len(decided)} tokens are clear-cut"
    weights, ids = sorted_by_id(*actual[:2])
    expected_weights, expected_ids = sorted_by_id(expected.weights, expected.ids)
    np.testing.assert_array_equal(ids[decided], expected_ids[decided])
    np.testing.assert_allclose(weights[decided], expected_weights[decided], rtol=tolerance, atol=tolerance)
