"""Cases of a layer on a mesh: strategy, where tokens are, sizes of the mesh, parts of the layer, options of the exchange."""

import itertools
import os
from typing import NamedTuple

from support.sharded_layers import SHARED, make_mesh, sharded_like, transforms

from moe_jax import ParallelConfig

STRATEGIES = ("replicated", "allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all")
ALL_TO_ALL = STRATEGIES[2:]

TOKENS = {
    # Which axes split experts, tensors, data and the sequence.
    "on all ranks of an expert axis": dict(expert_axis="expert", tensor_axis="tensor", data_axis="data"),
    "split over the expert axis": dict(
        expert_axis="expert", tensor_axis="tensor", data_axis="data", sequence_axis="expert"
    ),
    "as in vLLM": dict(expert_axis=("data", "expert"), tensor_axis="tensor", data_axis="data"),
    "split over a tensor axis": dict(expert_axis="expert", tensor_axis=("tensor", "data"), data_axis="data"),
}
LAYERS = {
    "plain": (dict(), None),
    "shared": (dict(shared_experts=SHARED), None),
    "transforms": (dict(shared_experts=SHARED), transforms),
    "redundancy": (dict(shared_experts=SHARED, num_experts=12, num_redundant_experts=4, top_k=3), None),
}
OPTIONS = {
    "one row per expert": dict(),
    "one row per rank": dict(one_row_per_rank=True),
    "two micro-batches": dict(micro_batches=2),
}
EXPERT, TENSOR, DATA = (1, 2, 4, 8), (1, 2), (1, 2)


class Case(NamedTuple):
    """Names in the tables above, and sizes of the mesh."""

    strategy: str
    tokens: str
    expert: int
    tensor: int
    data: int
    layer: str
    option: str

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    @property
    def num_devices(self) -> int:
        return self.expert * self.tensor * self.data

    @property
    def is_legal(self) -> bool:
        """Whether the strategy can run so."""
        if self.strategy == "replicated" and (
            self.tokens != "on all ranks of an expert axis" or self.option == "two micro-batches"
        ):
            return False
        return self.strategy in ALL_TO_ALL or self.option != "one row per rank"

    def layer_on_mesh(self, single, parts):
        """The layer `single` with the same parameters, as the case says."""
        parallel = ParallelConfig(strategy=self.strategy, **TOKENS[self.tokens], **OPTIONS[self.option])
        return sharded_like(single, make_mesh(self.data, self.expert, self.tensor), parallel, **parts)


def product(num_devices) -> list[Case]:
    """Every legal case of meshes for which `num_devices` holds."""
    cases = itertools.starmap(Case, itertools.product(STRATEGIES, TOKENS, EXPERT, TENSOR, DATA, LAYERS, OPTIONS))
    return [case for case in cases if num_devices(case.num_devices) and case.is_legal]


def whole_product_is_asked_for() -> bool:
    """Whether tests run all cases there are."""
    return bool(os.environ.get("MOE_JAX_WHOLE_PRODUCT"))


def covering(cases: list[Case]) -> list[Case]:
    """A few of `cases` in which every pair of options that any of them has occurs: greedily, those with the most new pairs."""

    def pairs_of(case):
        return set(itertools.combinations(enumerate(case), 2))

    missing, chosen = set().union(*map(pairs_of, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def in_turn(cases: list[Case]) -> list[Case]:
    """One of `cases` for each strategy, mesh and layer: from one to the next, with other tokens and options."""

    def without_tokens_and_option(case):
        return STRATEGIES.index(case.strategy), case.expert, case.tensor, case.data, tuple(LAYERS).index(case.layer)

    ordered = sorted(cases, key=without_tokens_and_option)
    groups = [list(group) for _, group in itertools.groupby(ordered, without_tokens_and_option)]
    # Layers follow each other; after the last of them one step more, so that none always meets the same tokens.
    return [group[(turn + turn // len(LAYERS)) % len(group)] for turn, group in enumerate(groups)]
