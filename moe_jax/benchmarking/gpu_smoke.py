"""One small call of each kernel, before anything is timed: known within seconds whether the kernels are right on this device."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmarking.expert_checks import TOLERANCE, check_forward, random_weights, relative_error
from moe_jax.benchmarking.expert_contestants import OURS, ours, why_not
from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.benchmarking.expert_work import draw_topk_ids, local_group_sizes
from moe_jax.benchmarking.gpu_cases import Case, Kind
from moe_jax.benchmarking.gpu_programs import FAILURES, describe_failure, device_failure, gradient_parts

SHAPE = ExpertShape(name="smoke", hidden_size=256, intermediate_size=128, num_experts=4, top_k=2)
TOKENS = {"stream": 8, "rows": 256, "rows_gradient": 256, "weights_gradient": 256}
"""By kernel. Few rows per expert stream the weights, many are tiled."""
FIRST_SECONDS, LONGEST_SECONDS = 180, 60
"""For the first kernel, which wakes the device and loads its libraries, and for one of the others; compiling included."""

Watch = Callable[[str, float], AbstractContextManager[None]]


def smoke_test(
    kinds: Iterable[Kind], rng: np.random.Generator, *, watch: Watch, report: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """The kernels that failed or were wrong, and why, of those that cases of these kinds use.

    Ends with the first failure after which the device computes nothing any more.

    Args:
        kinds: of the cases.
        rng: source of all random numbers.
        watch: gives a block so many seconds; ends the process when they are over.
        report: is told the outcome of every kernel.
    """
    implementation = next(name for name in OURS if why_not(SHAPE, TOKENS["rows"], name) is None)
    kernels = [name for name in TOKENS if ("backward" if name.endswith("gradient") else "forward") in kinds]
    for number, kernel in enumerate(kernels):
        started, check = time.monotonic(), _gradient_error if kernel.endswith("gradient") else _forward_error
        failure = None
        try:
            with watch(f"smoke test of {kernel}", LONGEST_SECONDS if number else FIRST_SECONDS):
                error = check(kernel, implementation, rng)
            outcome = f"relative error {error:.2g}"
            if not error <= TOLERANCE:
                failure = outcome = f"wrong: {outcome}"
        except FAILURES as raised:
            failure = outcome = describe_failure(raised)
        report(f"smoke test of {kernel} ({implementation}): {outcome}, {time.monotonic() - started:.0f} s")
        if failure is None:
            continue
        yield kernel, failure
        lost = device_failure()
        if lost is not None:
            yield "device", f"lost by the smoke test of {kernel}: {lost}"
            return


def _forward_error(kernel: str, implementation: str, rng: np.random.Generator) -> float:
    """Of a whole block, which uses the kernel for both products; infinite if it isn't the same every time."""
    contestant, weights = ours(SHAPE, implementation), random_weights(SHAPE, _key(rng))
    ids = draw_topk_ids(rng, SHAPE, TOKENS[kernel], "zipf")
    check = check_forward(jax.jit(contestant.block), weights, weights, SHAPE, ids, rng, with_traps=True)
    return check.error if check.repeats else float("inf")


def _gradient_error(kernel: str, implementation: str, rng: np.random.Generator) -> float:
    """Of one gradient of a grouped matmul alone, against float64."""
    case = Case(kind="backward", shape=SHAPE, tokens=TOKENS[kernel], routing="zipf")
    function, shapes = gradient_parts(case, f"moe_jax {implementation}")[kernel]
    sizes = local_group_sizes(SHAPE, draw_topk_ids(rng, SHAPE, case.tokens, case.routing))
    rows, cotangent, matrices = (jnp.asarray(rng.standard_normal(array.shape), array.dtype) for array in shapes[:3])
    result = jax.jit(function)(rows, cotangent, matrices, jnp.asarray(sizes, jnp.int32))[0]
    return relative_error(result, _expected_gradient(kernel, rows, cotangent, matrices, sizes))


def _expected_gradient(kernel: str, rows: Any, cotangent: Any, matrices: Any, sizes: np.ndarray) -> np.ndarray:
    """By the definition."""
    rows, cotangent, matrices = (np.asarray(array, np.float64) for array in (rows, cotangent, matrices))
    ends = np.cumsum(sizes)
    groups = [slice(start, end) for start, end in zip(ends - sizes, ends, strict=True)]
    if kernel == "weights_gradient":
        return np.stack([cotangent[group].T @ rows[group] for group in groups])
    return np.concatenate([cotangent[group] @ matrix for group, matrix in zip(groups, matrices, strict=True)])


def _key(rng: np.random.Generator) -> jax.Array:
    return jax.random.key(int(rng.integers(2**31)))
