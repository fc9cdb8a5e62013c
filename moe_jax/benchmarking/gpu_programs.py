"""The programs that the GPU suite compiles: many at a time, failures recorded, and what they make the host wait for."""

import collections
import concurrent.futures
import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmarking.expert_checks import gradients_of, random_tokens, random_weights
from moe_jax.benchmarking.expert_contestants import Contestant, Weights
from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.benchmarking.expert_work import draw_topk_ids
from moe_jax.benchmarking.gpu_cases import Case
from moe_jax.kernels import grouped_matmul

FAILURES = (Exception,)
"""Whatever a kernel that doesn't work raises: recorded beside the other measurements, which it must not cost."""
IN_PROGRAM_CALLS = 8
MOST_TOKENS_IN_PROGRAM = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Something compiled, or why it could not be."""

    call: Callable[..., Any] | None
    failure: str | None = None
    waits: tuple[str, ...] = ()
    """What in it makes the host wait."""


def compile_all(
    programs: Mapping[Any, tuple[Callable[..., Any], Sequence[Any]]], threads: int, until: float | None = None
) -> dict[Any, Program]:
    """Compile functions for arguments (arrays or shapes), several at a time; what fails is recorded.

    Args:
        programs: by key, the most wanted first.
        threads: programs that are compiled at a time.
        until: on the clock of `time.monotonic`; programs that were not begun then are left out.
    """

    def compile_one(function: Callable[..., Any], arguments: Sequence[Any]) -> Program | None:
        if until is not None and time.monotonic() > until:
            return None
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
        except FAILURES as error:
            return Program(None, describe_failure(error))
        return Program(compiled, None, waits_for_host(compiled.as_text() or ""))

    if threads == 1:  # in this thread, with its settings of jax
        outcomes = {key: compile_one(*program) for key, program in programs.items()}
    else:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            futures = {key: pool.submit(compile_one, *program) for key, program in programs.items()}
            outcomes = {key: future.result() for key, future in futures.items()}
    return {key: program for key, program in outcomes.items() if program is not None}


def waits_for_host(hlo: str) -> tuple[str, ...]:
    """Instructions of a compiled program for which a GPU's host waits: loops of unknown length, branches, callbacks."""
    found = []
    for line in hlo.splitlines():
        instruction = re.search(r"= .*? (while|conditional|infeed|outfeed|recv|custom-call)\(", line)
        if instruction is None:
            continue
        kind = instruction.group(1)
        if kind == "while" and "known_trip_count" in line:
            continue
        if kind == "custom-call" and "callback" not in line:
            continue
        found.append(kind)
    return tuple(f"{kind} ({count})" for kind, count in sorted(collections.Counter(found).items()))


def describe_failure(error: BaseException) -> str:
    """Its kind and message, shortened."""
    return f"{type(error).__name__}: {error}"[:2000]


def device_failure() -> str | None:
    """Why the device computes nothing any more, or None: an illegal address makes every later call of a process fail."""
    try:
        jax.block_until_ready(jax.device_put(np.ones(8, np.float32)) + 1)
    except FAILURES as error:
        return describe_failure(error)
    return None


def programs_of(
    entrants: Mapping[Case, Sequence[Contestant]], layouts: Mapping[str, Weights | str]
) -> dict[tuple, tuple[Callable[..., Any], Sequence[Any]]]:
    """What to compile for these cases, by key. Routings share programs, which depend on shapes alone.

    Args:
        entrants: those who take part in each case.
        layouts: the weights as each contestant wants them, or why it can't have them.
    """
    programs: dict[tuple, tuple[Callable[..., Any], Sequence[Any]]] = {}
    for case, listed in entrants.items():
        given = case.shape.fused_moe_arguments(case.tokens)
        tokens = [given["x"], given["topk_weights"], given["topk_ids"]]
        for contestant in listed:
            key, layout = (case.kind, case.tokens, contestant.name), layouts[contestant.name]
            if isinstance(layout, str):
                continue
            arguments = [*tokens, layout]
            if case.kind == "forward":
                programs[key] = (contestant.block, arguments)
                if case.tokens <= MOST_TOKENS_IN_PROGRAM and case.priority == 0:
                    sets = [tokens] * IN_PROGRAM_CALLS
                    programs[("in program", *key[1:])] = (several_times(contestant.block), [sets, layout])
                continue
            programs[key] = (gradients_of(contestant.block), [*arguments, given["x"]])
            for name, (function, shapes) in gradient_parts(case, contestant.name).items():
                programs[(name, *key[1:])] = (function, shapes)
    return programs


def gradient_parts(case: Case, contestant: str) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Gradients of `grouped_matmul` in rows and in weights for the gate/up projection, each alone, and their arguments."""
    shape = case.shape
    rows = max(8, shape.expected_rows(case.tokens))
    width = (2 if shape.activation.is_gated else 1) * shape.intermediate_size
    implementation = contestant.removeprefix("moe_jax ")
    describe = jax.ShapeDtypeStruct
    arguments = (
        describe((rows, shape.hidden_size), jnp.bfloat16),
        describe((rows, width), jnp.bfloat16),
        describe((shape.local_experts, width, shape.hidden_size), jnp.bfloat16),
        describe((shape.local_experts,), jnp.int32),
    )

    def multiply(rows: Any, matrices: Any, group_sizes: Any) -> Any:
        return grouped_matmul(rows, matrices, group_sizes, implementation=implementation)

    def rows_gradient(rows: Any, cotangent: Any, matrices: Any, group_sizes: Any) -> Any:
        return jax.vjp(lambda rows: multiply(rows, matrices, group_sizes), rows)[1](cotangent)

    def weights_gradient(rows: Any, cotangent: Any, matrices: Any, group_sizes: Any) -> Any:
        return jax.vjp(lambda matrices: multiply(rows, matrices, group_sizes), matrices)[1](cotangent)

    return {"rows_gradient": (rows_gradient, arguments), "weights_gradient": (weights_gradient, arguments)}


def several_times(block: Callable[..., Any]) -> Callable[..., Any]:
    """Calls of a block, one after the other in one program: as in a model, without the host in between."""
    call = jax.jit(block)

    def several(sets: Sequence[Sequence[Any]], weights: Any) -> list[Any]:
        results: list[Any] = []
        for x, topk_weights, topk_ids in sets:
            if results:  # a program's independent parts might otherwise run side by side
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(call(x, topk_weights, topk_ids, weights))
        return results

    return several


def check_launches(contestant: Contestant, shape: ExpertShape, tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    """Whether other routings retrace, and whether a call moves anything between host and device by itself."""
    weights = contestant.prepare(random_weights(shape, jax.random.key(0)))
    call = jax.jit(contestant.block)
    routings = [draw_topk_ids(rng, shape, tokens, routing) for routing in ("uniform", "zipf")]
    routings.append(np.tile(np.arange(shape.top_k, dtype=np.int32), (tokens, 1)))
    x, topk_weights = random_tokens(shape, tokens, jax.random.key(1))
    for ids in [jnp.asarray(ids) for ids in routings]:
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(call(x, topk_weights, ids, weights))
    return {"contestant": contestant.name, "routings": len(routings), "programs": call._cache_size()}  # pyright: ignore[reportAttributeAccessIssue]
