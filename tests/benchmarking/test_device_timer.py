"""Times of device work: statistics of recorded events, and the calls that are timed."""

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


def test_calls_that_are_not_alike_have_a_mean(monkeypatch):
    events = [DeviceEvent("block", float(i), 1.0) for i in range(25)]
    monkeypatch.setattr(device_timer, "record_device_events", lambda work: events)
    timing = time_calls(lambda: jnp.int32(0), [()])
    assert timing.busy == (2.5,)
    assert timing.kernels == {"block": 2.5}


def test_busy_time_is_the_sum_of_a_calls_events_and_the_argument_sets_take_turns(monkeypatch):
    seen = []

    def call(x):
        seen.append(int(x))
        return x

    def record(work):
        del seen[:]
        work()
        return [DeviceEvent(name, 0.0, s * (1 + x)) for x in seen for name, s in (("mosaic_gpu", 2.0), ("sort", 1.0))]

    monkeypatch.setattr(device_timer, "record_device_events", record)
    timing = time_calls(call, [(jnp.int32(i),) for i in range(3)], calls=12)
    assert sorted(timing.busy) == [3.0] * 4 + [6.0] * 4 + [9.0] * 4
    assert timing.seconds == pytest.approx(6.0)
    assert timing.kernels == {"mosaic_gpu": pytest.approx(4.0), "sort": pytest.approx(2.0)}
    assert timing.kernel_seconds("mosaic") == pytest.approx(4.0)
    assert timing.kernel_seconds("wgmma") is None
    assert timing.copies_to_host == 0


def test_copies_to_the_host_are_counted(monkeypatch):
    events = [DeviceEvent("MemcpyD2H", 0.0, 1.0)] * 10
    monkeypatch.setattr(device_timer, "record_device_events", lambda work: events)
    assert time_calls(lambda: jnp.int32(0), [()]).copies_to_host == 10


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
def test_device_events_must_agree_with_the_clock(monkeypatch, share, works):
    def record(work):
        return [DeviceEvent("dot", 0.0, 8.0 * share)] * (share > 0)

    monkeypatch.setattr(device_timer, "_queue_calls", lambda function, turns, calls: (8.0, 0.1))
    monkeypatch.setattr(device_timer, "record_device_events", record)
    assert device_timer.device_events_work(lambda: jnp.int32(0))[0] is works
