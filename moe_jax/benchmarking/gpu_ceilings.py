"""What the device at hand does at most: measured in the same run as the kernels that are compared with it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.benchmarking.device_timer import device_events_work, time_calls
from moe_jax.benchmarking.gpu_programs import FAILURES, describe_failure


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device did at most in this run."""

    dense_flops: float
    """Floating-point operations per second of a dense bf16 matmul."""
    copy_bytes: float
    """Bytes read plus bytes written per second of a copy."""
    launch_seconds: float
    """From one call of an empty program to the next."""
    device_events: bool
    """Whether times come from the device's events."""
    timer: str
    """The same in words."""


def measure_ceilings(width: int = 8192, copied_bytes: int = 4 << 30) -> Ceilings:
    """Measure them, on random data."""
    keys = jax.random.split(jax.random.key(int(time.time())), 4)
    draw = jax.jit(lambda key: jax.random.normal(key, (width, width), jnp.bfloat16))
    matrices = [draw(key) for key in keys]
    matmul = jax.jit(lambda a, b: a @ b)
    try:
        works, seen = device_events_work(lambda: matmul(*matrices[:2]))
    except FAILURES as error:  # a profiler that may not look at the device, say
        works, seen = False, describe_failure(error)
    timer = f"by device events ({seen})" if works else f"by the clock around queued calls (device events fail: {seen})"

    def seconds(function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> float:
        return time_calls(function, sets, device_events=works).seconds

    dense = seconds(matmul, [(matrices[i], matrices[(i + 1) % 4]) for i in range(4)])
    data = jax.random.normal(keys[0], (copied_bytes // 4,), jnp.float32)
    # Two ways to read everything once and write it once; the runtime's own copy isn't always the faster.
    copy = min(seconds(jax.jit(jnp.copy), [(data,)]), seconds(jax.jit(jnp.negative), [(data,)]))
    nothing = time_calls(jax.jit(lambda x: x + 1), [(jnp.int32(0),)], calls=100, device_events=False)
    return Ceilings(
        dense_flops=2 * width**3 / dense,
        copy_bytes=2 * data.nbytes / copy,
        launch_seconds=nothing.queued,
        device_events=works,
        timer=timer,
    )
