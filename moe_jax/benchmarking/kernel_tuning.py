"""Finds the fastest tile sizes of a kernel for a shape, on the device at hand.

A candidate replaces the default only if it is faster by more than the times scatter, and stays so when both are measured
again, taking turns: the fastest of a hundred equals is always a little faster by luck.
"""

import dataclasses
import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.benchmarking.device_timer import Timing, time_calls
from moe_jax.benchmarking.expert_shapes import ExpertShape
from moe_jax.benchmarking.expert_work import draw_topk_ids, local_group_sizes, sets_to_rotate
from moe_jax.benchmarking.gpu_programs import FAILURES, Program, compile_all, describe_failure
from moe_jax.kernels.device import GpuDevice, targeting
from moe_jax.kernels.groups import Groups
from moe_jax.kernels.mosaic_gpu import matmuls
from moe_jax.kernels.mosaic_gpu.choice import ChosenTiles, choose_tiles
from moe_jax.kernels.mosaic_gpu.schedule import aligned_groups, aligned_num_rows
from moe_jax.kernels.mosaic_gpu.tuning import Entry, KernelShape, Tiles, rows_bucket, trying
from moe_jax.kernels.mosaic_gpu.tuning_candidates import candidates

LEAST_GAIN = 0.02
"""Share of the default's time by which a candidate must be faster, however little the times scatter."""
FINAL_ROUNDS = 5
MOST_ERROR = 1e-2

Measure = Callable[[Sequence[Tiles | None]], list[Timing | str]]
"""Times of a kernel with each of these tiles (None: its default), or why one can't be had."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One kernel at one place of an MoE block."""

    kernel: str
    """See `tuning.TILES_OF_KERNEL`."""
    place: str
    """"gate_up" or "down"."""
    shape: ExpertShape
    tokens: int

    @property
    def name(self) -> str:
        """For the terminal."""
        return f"{self.kernel} of {self.place}, {self.shape.name}, {self.tokens} tokens"

    @property
    def expected_rows(self) -> int:
        """Pairs of a token and a local expert, about: what tiles are chosen by."""
        return self.shape.expected_rows(self.tokens)

    @property
    def layout_rows(self) -> int:
        """Rows of the layout in which the op calls the kernel: room for all pairs, and padding."""
        return aligned_num_rows(self.tokens * self.shape.top_k, self.shape.local_experts)

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """[E, projections, out, in]."""
        E, H, I = self.shape.local_experts, self.shape.hidden_size, self.shape.intermediate_size  # noqa: E741
        return (E, 2 if self.shape.activation.is_gated else 1, I, H) if self.place == "gate_up" else (E, 1, H, I)

    @property
    def kernel_shape(self) -> KernelShape:
        """What the kernel's tiles are looked up by."""
        groups, projections, width_out, width_in = self.weights_shape
        if self.kernel in ("rows_gradient", "weights_gradient"):  # these see gate and up as one wide matrix
            width_out, projections = width_out * projections, 1
        if self.kernel == "rows_gradient":
            width_in, width_out = width_out, width_in
        return KernelShape(
            groups=groups,
            width_in=width_in,
            width_out=width_out,
            projections=projections,
            dtype="bfloat16",
            rows_bucket=rows_bucket(self.expected_rows, groups),
        )


def problems(shape: ExpertShape, tokens: int, device: GpuDevice, *, backward: bool) -> Iterator[Problem]:
    """The kernels that `fused_moe` runs for a shape."""
    for place in ("gate_up", "down"):
        forward = Problem(kernel="rows", place=place, shape=shape, tokens=tokens)
        kernel, _ = matmuls.chosen_for_forward(
            forward.expected_rows, forward.weights_shape, jnp.bfloat16, jnp.bfloat16, device
        )
        yield dataclasses.replace(forward, kernel=kernel)
        if backward:
            yield dataclasses.replace(forward, kernel="rows_gradient")
            yield dataclasses.replace(forward, kernel="weights_gradient")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What tuning one problem found."""

    problem: Problem
    entry: Entry | None
    """The entry to keep; None if nothing is clearly faster than the default."""
    why: str
    """In words."""
    failed: dict[Tiles, str]
    """Candidates that could not be measured, or were wrong."""


def tune(problem: Problem, device: GpuDevice, measure: Measure, *, most_candidates: int | None = None) -> Outcome:
    """Measure the candidates, then the best against the default again, taking turns.

    Args:
        problem: see there.
        device: what `measure` measures on.
        measure: see `Measure`.
        most_candidates: look at no more, evenly spread over all.

    Raises:
        RuntimeError: the default itself can't be measured.
    """
    tried = list(candidates(problem.kernel, problem.kernel_shape, device))
    if most_candidates is not None and len(tried) > most_candidates:
        tried = [tried[index] for index in np.linspace(0, len(tried) - 1, most_candidates).astype(int)]
    default, *timings = measure([None, *tried])
    if isinstance(default, str):
        raise RuntimeError(f"{problem.name}: the default tiles cannot be measured: {default}")
    failed = {tiles: timing for tiles, timing in zip(tried, timings, strict=True) if isinstance(timing, str)}
    timed = [(timing.seconds, index) for index, timing in enumerate(timings) if isinstance(timing, Timing)]
    if not timed:
        return Outcome(problem, None, f"none of {len(tried)} candidates could be measured", failed)
    best = tried[min(timed)[1]]
    ratios, best_seconds, default_seconds, spreads = [], [], [], []
    for _ in range(FINAL_ROUNDS):
        again_default, again_best = measure([None, best])
        if isinstance(again_default, str) or isinstance(again_best, str):
            return Outcome(problem, None, f"{best} could not be measured again", failed)
        ratios.append(again_best.seconds / again_default.seconds)
        best_seconds.append(again_best.seconds)
        default_seconds.append(again_default.seconds)
        spreads.append(max(again_best.spread, again_default.spread))
    gain = 1 - statistics.median(ratios)
    noise = max(LEAST_GAIN, max(ratios) - min(ratios), statistics.median(spreads))
    figures = f"{100 * gain:.1f} % faster than the default, noise {100 * noise:.1f} %, {len(timed)} candidates"
    if gain <= noise:
        return Outcome(problem, None, f"the default stays: the best, {best}, is {figures}", failed)
    entry = Entry(
        kernel=problem.kernel,
        shape=problem.kernel_shape,
        tiles=best,
        microseconds=round(statistics.median(best_seconds) * 1e6, 2),
        default_microseconds=round(statistics.median(default_seconds) * 1e6, 2),
        measured=f"{datetime.datetime.now(datetime.UTC).date().isoformat()}, jax {jax.__version__}",
    )
    return Outcome(problem, entry, f"{best} is {figures}", failed)


def measure_on_device(
    problem: Problem, device: GpuDevice, *, device_events: bool, threads: int = 8, seed: int = 0
) -> Measure:
    """A `Measure` that runs the kernel on random data, uniformly routed, and compares each result with the default's."""
    rng = np.random.default_rng(seed)
    shape, (_, projections, width_out, width_in) = problem.shape, problem.weights_shape
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    sizes = [local_group_sizes(shape, draw_topk_ids(rng, shape, problem.tokens, "uniform")) for _ in range(4)]
    weight_bytes = int(np.count_nonzero(sizes[0])) * projections * width_out * width_in * 2
    count = min(sets_to_rotate(weight_bytes, device.l2_bytes), len(sizes))
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    weights = draw(next(keys), problem.weights_shape)
    wide = (problem.layout_rows, projections * width_out)
    rows, cotangents = (
        [draw(next(keys), shape) for _ in range(count)] for shape in ((problem.layout_rows, width_in), wide)
    )
    sets = [
        (row, cotangent, weights, jnp.asarray(size, jnp.int32))
        for row, cotangent, size in zip(rows, cotangents, sizes, strict=False)
    ]
    is_member = np.asarray(aligned_groups(sets[0][3]).contain(problem.layout_rows))
    expected: list[Array] = []
    compiled: dict[Tiles | None, Program] = {}

    def measure(tried: Sequence[Tiles | None]) -> list[Timing | str]:
        missing = {tiles: (kernel_call(problem, tiles, device), sets[0]) for tiles in tried if tiles not in compiled}
        compiled.update(compile_all(missing, threads))
        outcomes: list[Timing | str] = []
        for tiles in tried:
            program = compiled[tiles]
            if tiles is not None and not expected:
                outcomes.append("the default, with whose result it would be compared, has none")
                continue
            if program.call is None:
                outcomes.append(str(program.failure))
                continue
            try:
                result = program.call(*sets[0])
                if problem.kernel != "weights_gradient":  # rows of no group hold anything
                    result = jnp.where(is_member[:, None], result, 0)
                if tiles is None and not expected:
                    expected.append(result)
                difference = jnp.linalg.norm((result - expected[0]).astype(jnp.float32))
                error = float(difference / jnp.linalg.norm(expected[0].astype(jnp.float32)))
                if not error <= MOST_ERROR:
                    outcomes.append(f"differs from the default's result by {error:.2g}")
                    continue
                outcomes.append(time_calls(program.call, sets, device_events=device_events))
            except FAILURES as failure:
                outcomes.append(describe_failure(failure))
        return outcomes

    return measure


def kernel_call(problem: Problem, tiles: Tiles | None, device: GpuDevice) -> Callable[..., Array]:
    """(rows, cotangent, weights, sizes) -> result: the kernel as the op calls it, with these tiles (None: its default)."""
    activation = problem.shape.activation if problem.place == "gate_up" else None

    def call(rows: Array, cotangent: Array, weights: Array, sizes: Array) -> Array:
        groups: Groups = aligned_groups(sizes)
        options: dict[str, Any] = {
            "expected_rows": problem.expected_rows,
            "output_dtype": jnp.bfloat16,
            "device": device,
        }
        as_one = weights.reshape(weights.shape[0], -1, weights.shape[3])
        with targeting(device), trying(problem.kernel, tiles):
            match problem.kernel:
                case "rows" | "stream":
                    return matmuls.multiply(rows, weights, groups, activation=activation, **options)
                case "rows_gradient":
                    return matmuls.rows_gradient(cotangent, as_one, groups, **options)
                case _:
                    return matmuls.weights_gradient(cotangent, rows, groups, **options)

    return call


def chosen_tiles(problem: Problem, device: GpuDevice) -> ChosenTiles:
    """What the op would use: the tuned tiles if there are any, otherwise the default."""
    shape = problem.kernel_shape
    return choose_tiles(
        problem.kernel,  # pyright: ignore[reportArgumentType]
        num_rows=problem.expected_rows,
        num_groups=shape.groups,
        width_in=shape.width_in,
        width_out=shape.width_out,
        projections=shape.projections,
        dtype=jnp.dtype(shape.dtype),
        output_dtype=jnp.dtype(shape.dtype),
        device=device,
    )
