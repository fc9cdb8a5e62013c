"""The harness that times contestants in different processes."""

import os
import sys
import time

import pytest

from moe_jax.benchmarking.contest import Contest, Round, WorkerEndedError, hold_contest, judge, worker

ECHO = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["action"] == "die":
        sys.exit(3)
    if request["action"] == "hang":
        time.sleep(60)
    print(json.dumps({"got": request}), flush=True)
"""


def scripted(times):
    """A contestant that takes the next of these times at every turn."""
    remaining = iter(times)
    return lambda seconds: [next(remaining)]


def hold(ours, *others, rounds=2, most_rounds=6):
    measures = {"ours": scripted(ours)} | {f"other{i}": scripted(times) for i, times in enumerate(others)}
    return hold_contest(
        measures,
        ours="ours",
        rounds=rounds,
        most_rounds=most_rounds,
        seconds_per_turn=0,
        report=lambda contest: None,
        pause=0,
    )


def test_speedup_is_against_the_faster_of_the_others():
    contest = hold([1.0, 1.0], [3.0, 3.0], [2.0, 2.0])
    assert contest.fastest_other == "other1"
    assert contest.speedup == pytest.approx(2.0)


def test_a_round_that_slows_another_contestant_down_is_void_and_repeated():
    contest = hold([1.0, 9.0, 1.0], [2.0, 3.1, 2.0])
    assert [round_.void for round_ in contest.rounds] == [False, True, False]
    assert contest.speedup == pytest.approx(2.0)


def test_a_later_shorter_round_voids_earlier_ones():
    rounds = judge([{"other": 3.1}, {"other": 2.0}], ["other"])
    assert [round_.void for round_ in rounds] == [True, False]


def test_our_own_slow_rounds_count():
    contest = hold([1.0, 5.0], [2.0, 2.0])
    assert not any(round_.void for round_ in contest.rounds)


def test_gives_up_on_a_machine_that_never_becomes_quiet():
    contest = hold([1.0] * 4, [8.0, 4.0, 2.0, 1.0], most_rounds=4)
    assert len(contest.rounds) == 4
    assert len(contest.valid_rounds) == 1


def test_median_over_rounds():
    rounds = tuple(Round({"ours": 1.0, "other": time}) for time in (1.0, 2.0, 30.0))
    assert Contest("ours", ("other",), rounds).speedup == pytest.approx(2.0)


def test_worker_answers_requests_and_its_death_is_an_error():
    with worker([sys.executable, "-c", ECHO], environment=os.environ) as process:
        assert process.request("hello", size=3) == {"got": {"action": "hello", "size": 3}}
        with pytest.raises(RuntimeError, match="ended with code 3 at 'die'"):
            process.request("die")


def test_what_a_library_prints_is_not_taken_for_an_answer(capsys):
    chatty = "import sys\nfor line in sys.stdin: print('loading kernels'); print('{\"done\": 1}', flush=True)"
    with worker([sys.executable, "-c", chatty], environment=os.environ) as process:
        assert process.request("one") == process.request("two") == {"done": 1}
    assert "loading kernels" in capsys.readouterr().err


def test_a_worker_that_ended_between_requests_is_an_error_of_each_request_and_none_of_the_block():
    answers_once = "import os, sys; sys.stdin.readline(); print('{}', flush=True); os._exit(3)"
    with worker([sys.executable, "-c", answers_once], environment=os.environ) as process:
        assert process.request("hello") == {}
        process._process.wait()
        for _ in range(2):
            with pytest.raises(WorkerEndedError, match="ended with code 3"):
                process.request("hello")


def test_a_worker_that_does_not_answer_in_time_is_ended():
    started = time.monotonic()
    with worker([sys.executable, "-c", ECHO], environment=os.environ, answer_seconds=0.5) as process:
        with pytest.raises(WorkerEndedError, match="did not answer 'hang' within 0.5 s"):
            process.request("hang")
        with pytest.raises(WorkerEndedError, match="ended with code -9"):
            process.request("hello")
    assert time.monotonic() - started < 30


def test_a_worker_that_does_not_end_by_itself_is_ended_with_the_block():
    with worker([sys.executable, "-c", "import time; time.sleep(60)"], environment=os.environ) as process:
        process.close(patience=0.1)
    assert process._process.returncode == -9


def test_no_pipe_to_a_worker_outlives_it():
    with worker([sys.executable, "-c", ECHO], environment=os.environ) as process:
        assert process.request("hello")
    assert process._process.stdin.closed
    assert process._process.stdout.closed
