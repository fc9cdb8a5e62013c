"""Times of device work: statistics of recorded events, and the calls that are timed."""

import itertools
import time
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.benchmarking import device_timer
from moe_jax.benchmarking.device_timer import DeviceEvent, Timing, device_events, split_by_call, time_calls


def plane(name, **lines):
    """A plane of a profile; times in ns."""
    return types.SimpleNamespace(
        name=name,
        lines=[
            types.SimpleNamespace(
                name=line,
                events=[
                    types.SimpleNamespace(name=n, start_ns=start, duration_ns=length) for n, start, length in events
                ],
            )
            for line, events in lines.items()
        ],
    )


def test_device_events_are_those_of_the_streams_of_gpus_in_order():
    planes = [
        plane("/host:CPU", **{"Stream #1": [("python", 0, 99)]}),
        plane(
            "/device:GPU:0",
            **{
                "Stream #18(Compute)": [("second", 3000, 500), ("first", 1000, 2000)],
                "XLA Ops": [("first", 1000, 2000)],
            },
        ),
    ]
    assert device_events(planes) == [
        DeviceEvent("first", pytest.approx(1e-6), pytest.approx(2e-6)),
        DeviceEvent("second", pytest.approx(3e-6), pytest.approx(5e-7)),
    ]


def test_events_are_split_evenly_or_not_at_all():
    events = [DeviceEvent(name, float(i), 1.0) for i, name in enumerate("ababab")]
    assert [[event.name for event in call] for call in split_by_call(events, 3)] == [["a", "b"]] * 3
    assert split_by_call(events, 4) is None
    assert split_by_call(events, 2) is None
    assert split_by_call([], 3) == []


def test_the_last_calls_can_be_kept_alone():
    events = [DeviceEvent(name, float(i), 1.0) for i, name in enumerate("ababab")]
    assert [[event.start for event in call] for call in split_by_call(events, 3, keep=2)] == [[2.0, 3.0], [4.0, 5.0]]
    assert split_by_call(events, 4, keep=2) is None


@pytest.fixture
def recorded(monkeypatch):
    """What is recorded of each call of the work, by a function of its arguments; warm-ups are of three calls."""

    def script(events_of_call):
        seen = []

        def queue(function, turns, calls):
            seen.extend(arguments for arguments in itertools.islice(turns, calls))
            return 8.0 * calls, 0.1 * calls

        def record(work):
            del seen[:]
            work()
            return [event for number, arguments in enumerate(seen) for event in events_of_call(number, *arguments)]

        def warm_up(function, turns):
            queue(function, turns, 3)
            return 3, 8.0

        monkeypatch.setattr(device_timer, "_queue_calls", queue)
        monkeypatch.setattr(device_timer, "_warm_up", warm_up)
        monkeypatch.setattr(device_timer, "record_device_events", record)

    return script


def test_calls_that_are_not_alike_have_a_mean(recorded):
    recorded(lambda number: [DeviceEvent("block", float(number), 1.0)] * (2 + number % 2))
    timing = time_calls(None, [()], calls=11)  # with the warm-up 14
    assert timing.busy == (2.5,)
    assert timing.kernels == {"block": 2.5}


def test_busy_time_is_the_sum_of_a_calls_events_and_the_argument_sets_take_turns(recorded):
    recorded(lambda number, x: [DeviceEvent("mosaic_gpu", 0.0, 2.0 * x), DeviceEvent("sort", 0.0, 1.0 * x)])
    timing = time_calls(None, [(1,), (2,), (3,)], calls=12)
    assert sorted(timing.busy) == [3.0] * 4 + [6.0] * 4 + [9.0] * 4
    assert timing.seconds == pytest.approx(6.0)
    assert timing.kernels == {"mosaic_gpu": pytest.approx(4.0), "sort": pytest.approx(2.0)}
    assert timing.kernel_seconds("mosaic") == pytest.approx(4.0)
    assert timing.kernel_seconds("wgmma") is None
    assert timing.copies_to_host == 0


def test_what_is_recorded_while_the_device_speeds_up_does_not_count(recorded):
    recorded(lambda number: [DeviceEvent("mosaic_gpu", float(number), 9.0 if number < 3 else 1.0)])
    timing = time_calls(None, [()], calls=10)
    assert timing.busy == (1.0,) * 10
    assert timing.kernels == {"mosaic_gpu": 1.0}


def test_copies_to_the_host_are_counted(recorded):
    recorded(lambda number: [DeviceEvent("MemcpyD2H", 0.0, 1.0)])
    assert time_calls(None, [()], calls=10).copies_to_host == 10


@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, 30), (1.0, 10)])
def test_more_calls_are_recorded_if_they_are_short(recorded, monkeypatch, seconds, calls):
    recorded(lambda number: [DeviceEvent("dot", 0.0, seconds)])
    warm_up = device_timer._warm_up
    monkeypatch.setattr(device_timer, "_warm_up", lambda *arguments: (warm_up(*arguments)[0], seconds))
    assert len(time_calls(None, [()]).busy) == calls


def test_a_warm_up_takes_its_time_however_short_the_calls(monkeypatch):
    monkeypatch.setattr(device_timer, "WARM_UP_SECONDS", 0.02)
    called, started = [], time.perf_counter()
    calls, seconds = device_timer._warm_up(called.append, itertools.cycle([(1,), (2,)]))
    assert time.perf_counter() - started >= 0.02
    assert calls == len(called) > 2
    assert called[:4] == [1, 2, 1, 2]
    assert seconds > 0
    assert device_timer._warm_up(lambda: time.sleep(0.03), itertools.repeat(()))[0] == 2


def test_without_device_events_the_queued_time_counts(monkeypatch):
    monkeypatch.setattr(device_timer, "record_device_events", lambda work: [])
    timing = time_calls(jax.jit(lambda x: x + 1), [(jnp.ones(4),)])
    assert timing.busy is None
    assert timing.seconds == timing.queued > 0
    assert 0 < timing.issue <= timing.queued * 1.5
    assert timing.spread == 0


def test_a_profile_on_a_machine_without_gpu_holds_no_device_event():
    function = jax.jit(lambda x: x @ x)
    assert time_calls(function, [(jnp.ones((32, 32)),)]).busy is None


def test_spread_is_half_the_distance_of_the_quartiles():
    assert Timing(queued=1.0, issue=0.1, busy=[9.0, 10.0, 10.0, 10.0, 11.0]).spread == pytest.approx(0.05)


@pytest.mark.parametrize(("calls", "batches", "sets"), [(9, 1, [()]), (10, 0, [()]), (10, 1, [])])
def test_too_few_calls_are_refused(calls, batches, sets):
    with pytest.raises(ValueError, match="at least 10 calls"):
        time_calls(lambda: jnp.int32(0), sets, calls=calls, batches=batches)


@pytest.mark.parametrize(("share", "works"), [(1.0, True), (0.9, True), (0.5, False), (0.0, False)])
def test_device_events_must_agree_with_the_clock(recorded, share, works):
    recorded(lambda number: [DeviceEvent("dot", 0.0, 8.0 * share)] * (share > 0))
    assert device_timer.device_events_work(None)[0] is works


def test_events_and_the_clock_are_compared_on_the_same_calls(recorded, monkeypatch):
    """The device is slow until the profiler runs, and a little longer."""
    recorded(lambda number: [DeviceEvent("dot", 0.0, 40.0 if number < 3 else 8.0)])
    queue, batches = device_timer._queue_calls, []

    def slow_at_first(function, turns, calls):
        batches.append(calls)
        by_clock, issued = queue(function, turns, calls)
        return (by_clock * 5 if len(batches) < 2 else by_clock), issued

    monkeypatch.setattr(device_timer, "_queue_calls", slow_at_first)
    monkeypatch.setattr(device_timer, "_warm_up", lambda function, turns: (3, slow_at_first(function, turns, 3)[0]))
    works, seen = device_timer.device_events_work(None)
    assert works, seen
