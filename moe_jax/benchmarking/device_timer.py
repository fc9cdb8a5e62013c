"""How long a device works on a call: from the profiler's events on the device, and from the clock around many queued calls.

Two figures, because they answer two questions:

- *busy*: time in which the call's kernels and copies ran on the device, by the device's own events. What a kernel costs.
- *queued*: time per call of many that are issued one after the other without waiting. What a caller pays; never less than
  launching costs the host, which dominates calls of a few microseconds.

Argument sets take turns, so that what a call reads is no longer in the cache (`expert_work.sets_to_rotate`).

An idle GPU runs at a fraction of its clock, and takes tens of milliseconds of work to speed up. So before anything is measured
the calls are repeated for that long, and again once the profiler has started, which takes so long that the clock falls.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

FEWEST_CALLS = 10
SHORT_CALLS, SHORT_SECONDS = 30, 3e-3
"""So many calls are measured where one takes less than that: few of them would scatter."""
WARM_UP_SECONDS = 0.06
"""Assumed to be long enough for the GPU's clock to rise to its highest."""
MOST_QUEUED = 64
"""Calls that a warm-up issues before it waits and looks at the clock."""


class DeviceEvent(NamedTuple):
    """A kernel or a copy that ran on a device."""

    name: str
    start: float
    """Seconds."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one call, in seconds; compiling and warming up are not part of them."""

    queued: float
    """Median over batches of queued calls, per call."""
    issue: float
    """Median time until a queued call returned to the host, which then goes on."""
    busy: Sequence[float] | None = None
    """Of each call, by device events; None if the device's events could not be had."""
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Median busy time per call, by kernel's name."""
    copies_to_host: int = 0
    """Copies from the device to the host during the calls: each one makes the host wait."""

    @property
    def seconds(self) -> float:
        """The time to compare kernels by: busy if it is known, otherwise queued."""
        return self.queued if self.busy is None else statistics.median(self.busy)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the busy time, as a share of the median; 0 if it isn't known."""
        if self.busy is None or len(self.busy) < 4:
            return 0.0
        lower, median, upper = statistics.quantiles(self.busy, n=4)
        return (upper - lower) / 2 / median

    def kernel_seconds(self, mark: str) -> float | None:
        """Median busy time per call of the kernels whose name contains `mark`; None if there is none."""
        times = [seconds for name, seconds in self.kernels.items() if mark in name]
        return sum(times) if times else None


def time_calls(
    function: Callable[..., Any],
    argument_sets: Sequence[Sequence[Any]],
    *,
    calls: int | None = None,
    batches: int = 3,
    device_events: bool = True,
) -> Timing:
    """Time `function(*arguments)` with the argument sets taking turns.

    Args:
        function: compiled or jitted; returns arrays.
        argument_sets: at least one.
        calls: calls whose device events are recorded, and calls per queued batch; at least 10. None: 10, or 30 of short calls.
        batches: of queued calls.
        device_events: whether to record them at all.

    Raises:
        ValueError: too few calls, no argument set.
    """
    if (calls is not None and calls < FEWEST_CALLS) or batches < 1 or not argument_sets:
        raise ValueError(
            f"at least {FEWEST_CALLS} calls, 1 batch and 1 argument set are needed,"
            f" got {calls}, {batches} and {len(argument_sets)}"
        )
    turns = itertools.cycle(argument_sets)
    _, seconds = _warm_up(function, turns)
    if calls is None:
        calls = SHORT_CALLS if seconds < SHORT_SECONDS else FEWEST_CALLS
    queued, issue = [], []
    for _ in range(batches):
        total, issued = _queue_calls(function, turns, calls)
        queued.append(total / calls)
        issue.append(issued / calls)
    if not device_events:
        return Timing(queued=statistics.median(queued), issue=statistics.median(issue))
    recorded = _record_calls(function, turns, calls)
    return Timing(
        queued=statistics.median(queued),
        issue=statistics.median(issue),
        busy=recorded.busy,
        kernels=recorded.seconds_by_name,
        copies_to_host=sum("DtoH" in event.name or "D2H" in event.name for event in recorded.events),
    )


def _warm_up(function: Callable[..., Any], turns: Iterator[Sequence[Any]]) -> tuple[int, float]:
    """Repeat calls for `WARM_UP_SECONDS`, two at least: how many there were, and the seconds that one of the last ones took."""
    calls, batch, seconds, started = 0, 1, 0.0, time.perf_counter()
    while calls < 2 or time.perf_counter() - started < WARM_UP_SECONDS:
        total, _ = _queue_calls(function, turns, batch)
        seconds = total / batch
        calls += batch
        batch = min(calls, MOST_QUEUED)  # one, and then twice as many each time
    return calls, seconds


def _queue_calls(function: Callable[..., Any], turns: Iterable[Sequence[Any]], calls: int) -> tuple[float, float]:
    """Seconds until all of these calls are done, and until the last one was issued."""
    argument_sets = list(itertools.islice(turns, calls))
    results = None
    started = time.perf_counter()
    for arguments in argument_sets:
        results = function(*arguments)  # earlier results are let go, or memory would fill up
    issued = time.perf_counter() - started
    jax.block_until_ready(results)
    return time.perf_counter() - started, issued


def record_device_events(work: Callable[[], Any]) -> list[DeviceEvent]:
    """Kernels and copies that ran on GPUs during `work()`, in the order of their start; none on other devices."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
        return device_events(planes)


def device_events(planes: Iterable[Any]) -> list[DeviceEvent]:
    """The events of the streams of GPUs, of a profile's planes (`jax.profiler.ProfileData`)."""
    events = [
        DeviceEvent(event.name, event.start_ns * 1e-9, event.duration_ns * 1e-9)
        for plane in planes
        if plane.name.startswith("/device:GPU:")
        for line in plane.lines
        if line.name.startswith("Stream")  # other lines repeat the same time by module or operation
        for event in line.events
    ]
    return sorted(events, key=lambda event: event.start)


def split_by_call(
    events: Sequence[DeviceEvent], calls: int, keep: int | None = None
) -> list[Sequence[DeviceEvent]] | None:
    """The events of each call, or of the last `keep` calls.

    None if the calls are not alike (a loop's length may depend on values).
    """
    size = len(events) // calls
    by_call = [events[start : start + size] for start in range(0, size * calls, size)] if size else []
    names = [sorted(event.name for event in call) for call in by_call]
    if len(events) != size * calls or any(other != names[0] for other in names):
        return None
    return by_call if keep is None else by_call[-keep:]


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """What the device did in calls that followed a warm-up, all of it recorded."""

    events: Sequence[DeviceEvent]
    """Of the calls that count."""
    calls: int
    """How many count: the warm-up's too if the calls are not alike, because then it can't be told apart."""
    by_call: list[Sequence[DeviceEvent]] | None
    """The events of each; None if the calls are not alike."""
    by_clock: float
    """Seconds of those after the warm-up, per call."""

    @property
    def mean(self) -> float:
        """Seconds of events per call."""
        return sum(event.seconds for event in self.events) / self.calls

    @property
    def busy(self) -> tuple[float, ...] | None:
        """Of each call, or the mean alone if the calls are not alike; None without events."""
        if not self.events:
            return None
        if self.by_call is None:
            return (self.mean,)
        return tuple(sum(event.seconds for event in call) for call in self.by_call)

    @property
    def seconds_by_name(self) -> dict[str, float]:
        """Median over the calls, or the mean if they are not alike."""
        names = dict.fromkeys(event.name for event in self.events)
        if self.by_call is None:
            total = {name: sum(event.seconds for event in self.events if event.name == name) for name in names}
            return {name: seconds / self.calls for name, seconds in total.items()}
        return {
            name: statistics.median(sum(event.seconds for event in call if event.name == name) for call in self.by_call)
            for name in names
        }


def _record_calls(function: Callable[..., Any], turns: Iterator[Sequence[Any]], calls: int) -> _Recorded:
    """Record a warm-up and so many calls after it, and take the time of these by the clock too."""
    warm_ups, by_clock = 0, 0.0

    def work() -> None:
        nonlocal warm_ups, by_clock
        warm_ups, _ = _warm_up(function, turns)
        by_clock = _queue_calls(function, turns, calls)[0] / calls

    events = record_device_events(work)
    by_call = split_by_call(events, warm_ups + calls, keep=calls)
    if by_call is None:
        return _Recorded(events, warm_ups + calls, None, by_clock)
    return _Recorded([event for call in by_call for event in call], calls, by_call, by_clock)


def device_events_work(long_call: Callable[[], Any], tolerance: float = 0.2) -> tuple[bool, str]:
    """Whether device events agree with the clock on a call that keeps the device busy for long, and what was seen.

    Both are taken of the same calls: the device's speed changes from one batch to the next.

    Args:
        long_call: takes milliseconds of device time, and is compiled.
        tolerance: share by which the two may differ.
    """
    turns = itertools.repeat(())
    _warm_up(long_call, turns)
    recorded = _record_calls(long_call, turns, SHORT_CALLS)
    by_clock, by_events = recorded.by_clock, recorded.mean
    seen = f"a call took {by_clock * 1e3:.3g} ms by the clock and {by_events * 1e3:.3g} ms by device events"
    return bool(recorded.events) and abs(by_events - by_clock) <= tolerance * by_clock, seen
