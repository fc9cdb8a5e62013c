"""What the GPU suite measures, the most telling cases first: when time is short the last ones are left out, and named."""

import dataclasses
import fnmatch
from collections.abc import Container, Iterable, Sequence
from typing import Literal

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, TOKENS, ExpertShape
from moe_jax.benchmarking.expert_work import ROUTINGS, Routing

Kind = Literal["forward", "backward"]

BACKWARD_TOKENS = (2048, 8192, 32768)
NO_BACKWARD = ("deepseek-v3",)
"""Its weights and two generations of their gradients don't fit; its ranks' shares are measured instead."""
TELLING = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3-ep32")
"""Few large experts, many small ones, one rank's share: first of all, with more sizes, and beside what others offer."""
TELLING_TOKENS = (8192, 8, 1, 2048, 32768)
FIRST_TOKENS = (8192, 8, 1)
SECOND_TOKENS = (2048, 32768, 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the tables."""

    kind: Kind
    shape: ExpertShape
    tokens: int
    routing: Routing
    is_telling: bool = False
    """Of a shape that is measured more thoroughly."""

    @property
    def name(self) -> str:
        """Such as `forward/mixtral-8x7b/T8192/uniform`: what `--only` is matched against."""
        return f"{self.kind}/{self.shape.name}/T{self.tokens}/{self.routing}"

    @property
    def rows_per_expert(self) -> float:
        """On average."""
        return self.shape.rows_per_expert(self.tokens)

    @property
    def priority(self) -> int:
        """0 is measured first."""
        if self.routing == "uniform" and self.tokens in (TELLING_TOKENS if self.is_telling else FIRST_TOKENS):
            return 0
        if self.routing == "uniform" and self.tokens in SECOND_TOKENS:
            return 1
        return 2 if self.tokens in FIRST_TOKENS else 3

    @property
    def has_rivals(self) -> bool:
        """Whether it is measured beside what others offer, which takes several times as long."""
        return self.is_telling and self.priority == 0


def all_cases(
    shapes: Iterable[ExpertShape] = EXPERT_SHAPES.values(),
    tokens: Sequence[int] = TOKENS,
    backward_tokens: Sequence[int] = BACKWARD_TOKENS,
    telling: Container[str] = TELLING,
) -> list[Case]:
    """Every case, by priority; within one, cases of a shape follow one another, so that its weights are made once.

    Those of the shapes named by `telling` come before the others.
    """
    kinds: list[tuple[Kind, Routing]] = [*(("forward", routing) for routing in ROUTINGS), ("backward", "uniform")]
    cases = [
        Case(kind=kind, shape=shape, tokens=number, routing=routing, is_telling=shape.name in telling)
        for shape in shapes
        for number in tokens
        for kind, routing in kinds
        if kind == "forward" or (number in backward_tokens and shape.name not in NO_BACKWARD)
    ]
    return sorted(cases, key=lambda case: (case.priority, not case.is_telling))


def select(cases: Sequence[Case], *, only: str | None = None, quick: bool = False) -> list[Case]:
    """The cases whose name matches the pattern `only` (`*` is anything), and with `quick` only those of the first priority.

    Raises:
        ValueError: none is left.
    """
    chosen = [
        case
        for case in cases
        if (only is None or fnmatch.fnmatchcase(case.name, f"*{only}*")) and not (quick and case.priority > 0)
    ]
    if not chosen:
        examples = ", ".join(case.name for case in cases[:3])
        raise ValueError(f"no case matches {only!r}{' with --quick' if quick else ''}; cases are named {examples}, ...")
    return chosen
