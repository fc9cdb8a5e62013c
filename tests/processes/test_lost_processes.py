"""A process that is killed or stopped in the middle of a step ends the others of its job, soon and with an error."""

import contextlib
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import processes

STEPS = str(Path(__file__).parent / "steps.py")
SECONDS_TO_NOTICE = 30
SECONDS_TO_START = 120

CASES = {"killed": (signal.SIGKILL, 1), "stopped": (signal.SIGSTOP, 1), "coordinator stopped": (signal.SIGSTOP, 0)}

SIGNS_OF_A_LOST_PROCESS = ("another task died", "closed by peer", "Connection reset", "Connection closed")


def wait_for_steps(folder, running):
    """Return once every process has made a step."""
    deadline = time.monotonic() + SECONDS_TO_START
    while not all((folder / f"out.{number}").read_bytes().count(b"\n") > 2 for number in range(len(running))):
        assert time.monotonic() < deadline, "the processes made no step"
        assert all(process.poll() is None for process in running)
        time.sleep(0.1)


@pytest.mark.slow
def test_the_others_end_with_an_error(tmp_path):
    with contextlib.ExitStack() as stack:
        jobs = {}
        for name in CASES:  # side by side, because most of the time is spent waiting
            folder = tmp_path / name
            folder.mkdir()
            command = [STEPS, "{coordinator}", "{count}", "{number}"]
            jobs[name] = stack.enter_context(processes.started(command, count=2, devices=1, folder=folder))
        for name, running in jobs.items():
            wait_for_steps(tmp_path / name, running)
        for name, (number_signal, lost) in CASES.items():
            jobs[name][lost].send_signal(number_signal)
        deadline = time.monotonic() + SECONDS_TO_NOTICE
        for name, (_, lost) in CASES.items():
            survivor = jobs[name][1 - lost]
            try:
                status = survivor.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"{name}: the other process still runs after {SECONDS_TO_NOTICE} seconds")
            errors = (tmp_path / name / f"err.{1 - lost}").read_text()
            assert status != 0, name
            assert any(sign in errors for sign in SIGNS_OF_A_LOST_PROCESS), errors
