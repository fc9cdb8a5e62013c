"""Checks and times the experts' kernels on the device at hand, case by case, until the cases or the time are used up.

What fails is recorded and costs nothing else; only when the device itself is lost the rest is left out. What is measured is
saved after every row.
"""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmarking.contest import WorkerEndedError, WorkerProcess
from moe_jax.benchmarking.device_timer import Timing, time_calls
from moe_jax.benchmarking.expert_checks import (
    Check,
    check_backward,
    check_forward,
    random_tokens,
    random_weights,
)
from moe_jax.benchmarking.expert_contestants import Contestant, Weights, contestants
from moe_jax.benchmarking.expert_references import reference_programs
from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.benchmarking.expert_work import (
    ExpertWork,
    draw_topk_ids,
    local_group_sizes,
    sets_to_rotate,
    tile_ceiling,
)
from moe_jax.benchmarking.gpu_cases import Case
from moe_jax.benchmarking.gpu_ceilings import Ceilings
from moe_jax.benchmarking.gpu_products import (
    MATMUL_KERNELS,
    MatmulTime,
    Product,
    products,
    split_products,
    streamed_products,
    waves_ceiling,
)
from moe_jax.benchmarking.gpu_programs import (
    FAILURES,
    IN_PROGRAM_CALLS,
    Program,
    compile_all,
    describe_failure,
    device_failure,
    gradient_parts,
    programs_of,
)
from moe_jax.benchmarking.gpu_report import OURS, summary
from moe_jax.benchmarking.gpu_torch_side import measure_torch

REFERENCE = "float32"
"""Who computes what the contestants are compared with, in the keys of programs."""
UNFINISHED = "not finished: the process ended, or was ended, meanwhile"
LONGEST_SECONDS = 60
"""Longest time for one contestant's turn at a case, compiled already, and for making weights or tokens."""
LEAST_GROUP_SECONDS, LEAST_SECONDS = 60, 30
"""With less time left no group of cases is begun, and no turn or compilation, which might be cut off in the middle."""
COMPILED_SHARE = 0.5
"""Share of the time left in which the programs of a shape may be begun to be compiled: the rest is for measuring them."""
MOST_MASKED_SECONDS = 0.05
"""A contestant that multiplies all pairs is timed where that takes at most so long at the dense rate."""


@dataclasses.dataclass
class Suite:
    """Measures cases; keeps the rows."""

    ceilings: Ceilings
    rng: np.random.Generator
    deadline: float
    """On the clock of `time.monotonic`."""
    l2_bytes: int
    torch: WorkerProcess | None = None
    compile_threads: int = 8
    rivals: bool = True
    report: Callable[[str], None] = print
    save: Callable[[], None] = lambda: None
    """Called whenever a row is begun and done."""
    watch: Callable[[str, float], AbstractContextManager[None]] = lambda *_: contextlib.nullcontext()
    """Gives a block so many seconds; ends the process when they are over."""
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unable: dict[str, str] = dataclasses.field(default_factory=dict)
    """Who could not take part, with the reason."""
    lost: str | None = None
    """Why the device computes nothing any more."""

    def run(self, cases: Iterable[Case]) -> list[Case]:
        """Measure the cases, those of one shape and priority together; the cases that were not reached."""
        not_reached: list[Case] = []
        for (_, shape), listed in itertools.groupby(cases, lambda case: (case.priority, case.shape)):
            not_reached += self._run_group(shape, list(listed))
        return not_reached

    def _is_over(self, seconds: float = LEAST_SECONDS) -> bool:
        """Whether the device is lost, or less than so many seconds are left."""
        return self.lost is not None or time.monotonic() > self.deadline - seconds

    def _run_group(self, shape: ExpertShape, cases: list[Case]) -> list[Case]:
        if self._is_over(LEAST_GROUP_SECONDS):
            return cases
        entrants: dict[Case, list[Contestant]] = {}
        try:
            entrants |= {case: self._entrants(case) for case in cases}
            with self.watch(f"weights of {shape.name}", LONGEST_SECONDS):
                group = self._lay_out(shape, entrants)
            group.compiled |= self._compile(shape, entrants, group)
        except FAILURES as error:
            self._fail(cases, error)
            return []
        not_compiled: list[Case] = []
        for number, case in enumerate(cases):
            if self._is_over():
                return not_compiled + cases[number:]
            if not self._programs({case: entrants[case]}, group).keys() <= group.compiled.keys():
                not_compiled.append(case)
                continue
            try:
                with self.watch(f"tokens of {case.name}", LONGEST_SECONDS):
                    sets = self._draw_sets(case)
            except FAILURES as error:
                self._fail([case], error)
                continue
            for contestant in entrants[case]:
                self._add(case, contestant.name, sets, self._measure, contestant, group)
            if self.torch is not None and self.rivals and case.kind == "forward" and case.has_rivals:
                self._add(case, "torch grouped_mm", sets, self._measure_torch)
        return not_compiled

    def _lay_out(self, shape: ExpertShape, entrants: Mapping[Case, Sequence[Contestant]]) -> "_Group":
        weights = random_weights(shape, self._key())
        taking_part = {contestant.name: contestant for listed in entrants.values() for contestant in listed}
        layouts: dict[Callable[..., Weights], Weights | str] = {}
        for prepare in {contestant.prepare for contestant in taking_part.values()}:
            try:
                layouts[prepare] = jax.block_until_ready(prepare(weights))
            except FAILURES as error:  # a copy that doesn't fit costs those who need it
                layouts[prepare] = describe_failure(error)
        return _Group(weights, {name: layouts[contestant.prepare] for name, contestant in taking_part.items()})

    def _compile(
        self, shape: ExpertShape, entrants: Mapping[Case, Sequence[Contestant]], group: "_Group"
    ) -> dict[tuple, Program]:
        """The programs of the first cases, of as many as leave time to measure them."""
        started = time.monotonic()
        programs = self._programs(entrants, group)
        until = min(started + COMPILED_SHARE * (self.deadline - started), self.deadline - LEAST_SECONDS)
        compiled = compile_all(programs, self.compile_threads, until)
        self.report(
            f"{shape.name}: {len(compiled)} of {len(programs)} programs compiled in {time.monotonic() - started:.0f} s,"
            f" {max(0, self.deadline - time.monotonic()):.0f} s left"
        )
        return compiled

    def _programs(self, entrants: Mapping[Case, Sequence[Contestant]], group: "_Group") -> dict[tuple, Any]:
        """Those of each case together, so that the first cases can be measured if time ends the compiling."""
        programs: dict[tuple, Any] = {}
        for case, listed in entrants.items():
            programs |= programs_of({case: listed}, group.layouts)
            for product in self._products(case) if OURS in {contestant.name for contestant in listed} else ():
                programs[product.place, case.tokens, OURS] = (product.function, product.shapes())
            for (name, tokens), program in reference_programs(case.kind, case.shape, case.tokens).items():
                programs[name, tokens, REFERENCE] = program
        return programs

    def _products(self, case: Case) -> list[Product]:
        """Those that are timed alone, because the events of a whole block don't tell their time, or because there are none."""
        return [*split_products(case)] if self.ceilings.device_events else products(case)

    def _entrants(self, case: Case) -> list[Contestant]:
        able, unable = contestants(case.shape, case.tokens)
        self.unable |= unable
        if case.kind == "backward":
            return [contestant for contestant in able if contestant.is_ours][:1]
        if not self.rivals or not case.has_rivals:
            return [contestant for contestant in able if contestant.is_ours][:1]
        rows = case.tokens * case.shape.top_k
        work = ExpertWork.of(case.shape, np.full(case.shape.local_experts, -(-rows // case.shape.local_experts)), 0)
        masked_seconds = work.flops * case.shape.local_experts / self.ceilings.dense_flops
        too_slow = {c.name for c in able if c.multiplies_all_pairs and masked_seconds > MOST_MASKED_SECONDS}
        for name in too_slow:
            self.unable[f"{name} on {case.name}"] = "it multiplies every row by the matrix of every expert"
        return [contestant for contestant in able if contestant.name not in too_slow]

    def _draw_sets(self, case: Case) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """Argument sets that take turns."""
        ids = draw_topk_ids(self.rng, case.shape, case.tokens, case.routing)
        work = ExpertWork.of(case.shape, local_group_sizes(case.shape, ids), case.tokens)
        count = sets_to_rotate(work.bytes, self.l2_bytes)
        drawn = [ids, *(draw_topk_ids(self.rng, case.shape, case.tokens, case.routing) for _ in range(count - 1))]
        return [(*random_tokens(case.shape, case.tokens, self._key()), jnp.asarray(ids)) for ids in drawn]

    def _add(self, case: Case, name: str, sets: list, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Measure one contestant, and keep what came of it, failures too."""
        if self._is_over():
            return
        row = {**_described(case, name), "failed": UNFINISHED}
        self.rows.append(row)
        self.save()  # now, because what crashes or hangs can't say so afterwards
        try:
            row |= self._work(case, [np.asarray(ids) for _, _, ids in sets])
            with self.watch(f"{case.name}, {name}", LONGEST_SECONDS):
                row |= {"failed": None, **measure(case, sets, row, *arguments)}
        except FAILURES as error:
            row["failed"] = describe_failure(error)
            self.lost = device_failure()
        self._told(row)

    def _fail(self, cases: Sequence[Case], error: BaseException) -> None:
        """Keep what came before any contestant's turn: weights or tokens that don't fit, say."""
        self.lost = device_failure()
        for case in cases:
            self.rows.append({**_described(case, "all"), "failed": describe_failure(error)})
            self._told(self.rows[-1])

    def _told(self, row: Mapping[str, Any]) -> None:
        self.save()
        self.report(f"  {row['case']:44s} {row['contestant']:22s} {summary(row)}")
        if self.lost is not None:
            self.report(f"THE DEVICE IS LOST, the rest is left out: {self.lost}")

    @staticmethod
    def _work(case: Case, drawn: Sequence[np.ndarray]) -> dict[str, Any]:
        """Of a call, on average over the argument sets."""
        sizes = [local_group_sizes(case.shape, ids) for ids in drawn]
        works = [ExpertWork.of(case.shape, size, case.tokens) for size in sizes]
        passes = 3 if case.kind == "backward" else 1  # two products in the backward pass for each of the forward pass
        together = np.concatenate(sizes)
        return {
            "flops": passes * statistics.mean(work.flops for work in works),
            "weight_bytes": statistics.mean(work.weight_bytes for work in works),
            "largest_group": int(together.max()),
            "ceiling_128": tile_ceiling(together, 128),
            "ceiling_64": tile_ceiling(together, 64),
        }

    def _measure(
        self,
        case: Case,
        sets: list,
        row: Mapping[str, Any],
        contestant: Contestant,
        group: "_Group",
    ) -> dict[str, Any]:
        """Check, then time; one that is wrong is not timed."""
        prepared, compiled = group.layouts[contestant.name], group.compiled
        if isinstance(prepared, str):
            raise RuntimeError(f"its layout of the weights could not be made: {prepared}")
        program = compiled[case.kind, case.tokens, contestant.name]
        if program.call is None:
            raise RuntimeError(f"does not compile: {program.failure}")
        check = self._check(case, contestant, program.call, group, prepared)
        outcome: dict[str, Any] = {"error": check.error, "repeats": check.repeats, "waits_for_host": program.waits}
        if not check.passed:
            return {**outcome, "failed": f"wrong: {check}"}
        arguments = [(*tokens, prepared) for tokens in sets]
        if case.kind == "backward":
            arguments = [(*given, random_tokens(case.shape, case.tokens, self._key())[0]) for given in arguments]
        timing = self._time(program.call, arguments)
        if contestant.name == OURS:
            outcome["splits"] = {product.place: product.tiles.splits for product in streamed_products(case)}
            count = MatmulTime.by_events if self.ceilings.device_events else MatmulTime.by_clock
            matmuls = count(timing, self._time_products(case, sets, group))
            outcome["second_pass_seconds"] = matmuls.second_pass
            drawn = [local_group_sizes(case.shape, np.asarray(ids)) for _, _, ids in sets]
            outcome["ceiling_waves"] = waves_ceiling(case, drawn)
        else:
            matmuls = MatmulTime.by_events(timing, [])
        outcome |= self._shares(timing, row, matmuls)
        in_program = compiled.get(("in program", case.tokens, contestant.name))
        if case.kind == "forward" and in_program is not None and in_program.call is not None:
            turns = [sets[number % len(sets)] for number in range(IN_PROGRAM_CALLS)]
            whole = time_calls(in_program.call, [([list(tokens) for tokens in turns], prepared)], device_events=False)
            outcome["in_program_seconds"] = whole.queued / IN_PROGRAM_CALLS
        if case.kind == "backward":
            outcome |= self._gradient_parts(case, sets, contestant, group)
        return outcome

    def _check(self, case: Case, contestant: Contestant, call: Any, group: "_Group", prepared: Weights) -> Check:
        """With a routing that has hot and empty experts."""
        references = {}
        for name, tokens in reference_programs(case.kind, case.shape, case.tokens):
            program = group.compiled[name, tokens, REFERENCE]
            if program.call is None:
                raise RuntimeError(f"what it is compared with does not compile: {program.failure}")
            references[name] = program.call
        ids = draw_topk_ids(self.rng, case.shape, case.tokens, "zipf")
        if case.kind == "backward":
            return check_backward(call, group.weights, case.shape, ids, self.rng, references=references)
        return check_forward(
            call,
            group.weights,
            prepared,
            case.shape,
            ids,
            self.rng,
            with_traps=contestant.is_ours,
            references=references,
        )

    def _time_products(self, case: Case, sets: list, group: "_Group") -> list[Timing] | None:
        """Of each product that is timed alone; None if one of them can't be."""
        sizes = [local_group_sizes(case.shape, np.asarray(ids)) for _, _, ids in sets]
        timings = []
        for product in self._products(case):
            program = group.compiled[product.place, case.tokens, OURS]
            if program.call is None:
                return None
            timings.append(self._time(program.call, product.arguments(group.weights, sizes, self._key())))
        return timings

    def _shares(self, timing: Timing, row: Mapping[str, Any], matmuls: MatmulTime) -> dict[str, Any]:
        return {
            "seconds": timing.seconds,
            "spread": timing.spread,
            "call_seconds": timing.queued,
            "issue_seconds": timing.issue,
            "busy_seconds": None if timing.busy is None else timing.seconds,
            "matmul_seconds": matmuls.seconds,
            "kernels": dict(timing.kernels),
            "copies_to_host": timing.copies_to_host,
            "matmul_share": row["flops"] / matmuls.seconds / self.ceilings.dense_flops,
            "block_share": row["flops"] / timing.seconds / self.ceilings.dense_flops,
            "bandwidth_share": row["weight_bytes"] / matmuls.seconds / self.ceilings.copy_bytes or None,
        }

    def _gradient_parts(self, case, sets, contestant, group) -> dict[str, Any]:
        """Row and weight gradients of the gate/up projection alone."""
        sizes = local_group_sizes(case.shape, np.asarray(sets[0][2]))
        seconds: dict[str, float] = {}
        for name, (_, (rows, cotangent, matrices, group_sizes)) in gradient_parts(case, contestant.name).items():
            program = group.compiled[name, case.tokens, contestant.name]
            if program.call is None:
                raise RuntimeError(f"{name} does not compile: {program.failure}")
            given = [
                jax.random.normal(self._key(), rows.shape, rows.dtype),
                jax.random.normal(self._key(), cotangent.shape, cotangent.dtype),
                group.weights["gate_up_proj"].reshape(matrices.shape),
                jnp.asarray(_fitted(sizes, rows.shape[0]), group_sizes.dtype),
            ]
            timing = self._time(program.call, [given])
            seconds[f"{name}_seconds"] = timing.kernel_seconds(MATMUL_KERNELS) or timing.seconds
        ratio = seconds["weights_gradient_seconds"] / seconds["rows_gradient_seconds"]
        return {**seconds, "gradient_ratio": ratio}

    def _measure_torch(self, case: Case, sets: list, row: Mapping[str, Any]) -> dict[str, Any]:
        assert self.torch is not None
        try:
            outcome = measure_torch(self.torch, case.shape, [np.asarray(ids) for _, _, ids in sets])
        except WorkerEndedError as error:
            self.unable["torch grouped_mm"] = str(error)
            self.torch = None
            raise
        if "seconds" in outcome:
            outcome["block_share"] = row["flops"] / outcome["seconds"] / self.ceilings.dense_flops
        return outcome

    def _time(self, call: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> Timing:
        return time_calls(call, arguments, device_events=self.ceilings.device_events)

    def _key(self) -> jax.Array:
        return jax.random.key(int(self.rng.integers(2**31)))


@dataclasses.dataclass
class _Group:
    """What the cases of one shape and priority share."""

    weights: Weights
    layouts: dict[str, Weights | str]
    """By contestant: the weights as it wants them, or why it can't have them."""
    compiled: dict[tuple, Program] = dataclasses.field(default_factory=dict)


def _described(case: Case, contestant: str) -> dict[str, Any]:
    return {
        "case": case.name,
        "kind": case.kind,
        "shape": case.shape.name,
        "tokens": case.tokens,
        "routing": case.routing,
        "contestant": contestant,
        "mean_rows": case.rows_per_expert,
    }


def _fitted(sizes: np.ndarray, rows: int) -> np.ndarray:
    """The same group sizes, cut off after so many rows."""
    ends = np.minimum(np.cumsum(sizes), rows)
    return np.diff(ends, prepend=0)
