"""Fair timing of contestants that live in different processes: they take turns, and disturbed rounds don't count."""

import contextlib
import dataclasses
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

CONTENDED = 1.5
"""A round in which a contestant of the other side takes this many times its own shortest round is void."""


class WorkerEndedError(RuntimeError):
    """The process is gone: it ended, or was ended because it didn't answer. Asking again is useless."""


class WorkerProcess:
    """A process that answers requests, one JSON object per line on stdin and stdout."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], answer_seconds: float = 3600):
        """Start `command` with exactly this environment; one that takes longer than `answer_seconds` to answer is ended."""
        self.command = list(command)
        self.answer_seconds = answer_seconds
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        answers = cast(IO[str], self._process.stdout)
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def _read(self, answers: IO[str]) -> None:
        """In a thread of its own, because reading a line can't be given up; an empty line is the end."""
        with answers:
            for line in answers:
                if line.startswith("{"):
                    self._lines.put(line)
                else:  # what a library printed would otherwise be taken for the answer, and every answer for the next request
                    sys.stderr.write(line)
        self._lines.put("")

    def request(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerEndedError: the process ended, or did not answer in time; what it printed to stderr has been shown.
        """
        try:
            self._requests.write(json.dumps({"action": action, **arguments}) + "\n")
            self._requests.flush()
            answer = self._lines.get(timeout=self.answer_seconds)
        except (OSError, ValueError):  # a broken pipe, or one that was closed after it broke
            answer = ""
        except queue.Empty:
            self.close(patience=0)
            late = f"worker did not answer {action!r} within {self.answer_seconds:g} s and was ended"
            raise WorkerEndedError(f"{late}: {' '.join(self.command)}") from None
        if not answer:
            self.close()
            code = self._process.returncode
            raise WorkerEndedError(f"worker ended with code {code} at {action!r}: {' '.join(self.command)}")
        return json.loads(answer)

    def close(self, patience: float = 10) -> None:
        """Let the process end; after `patience` seconds, end it."""
        with contextlib.suppress(OSError):  # what was written to a process that is gone can't be flushed
            self._requests.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(1)  # it closes the pipe; one that a child of the process holds too stays open until that ends


@contextlib.contextmanager
def worker(
    command: Sequence[str], *, environment: Mapping[str, str], answer_seconds: float = 3600
) -> Iterator[WorkerProcess]:
    """A `WorkerProcess` that ends with the block."""
    process = WorkerProcess(command, environment=environment, answer_seconds=answer_seconds)
    try:
        yield process
    finally:
        process.close()


@dataclasses.dataclass(frozen=True)
class Round:
    """One turn of every contestant."""

    seconds: Mapping[str, float]
    """Median time of a call, by contestant."""
    void: bool = False
    """Something else kept the machine busy."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """Rounds of ours against the faster of several others."""

    ours: str
    others: tuple[str, ...]
    rounds: tuple[Round, ...]

    @property
    def valid_rounds(self) -> tuple[Round, ...]:
        """Those that count."""
        return tuple(round_ for round_ in self.rounds if not round_.void)

    def seconds(self, contestant: str) -> float:
        """Median over the rounds that count."""
        return statistics.median(round_.seconds[contestant] for round_ in self.valid_rounds)

    @property
    def fastest_other(self) -> str:
        """Whom we are compared with: the other contestant with the smallest median."""
        return min(self.others, key=self.seconds)

    @property
    def speedup(self) -> float:
        """How many times faster ours is: the median, over rounds, of the ratio to the fastest other."""
        rival = self.fastest_other
        return statistics.median(round_.seconds[rival] / round_.seconds[self.ours] for round_ in self.valid_rounds)


def hold_contest(
    measures: Mapping[str, Callable[[float], Sequence[float]]],
    *,
    ours: str,
    rounds: int,
    seconds_per_turn: float,
    most_rounds: int,
    report: Callable[[Contest], None],
    pause: float = 0.05,
) -> Contest:
    """Let the contestants take turns until `rounds` rounds count, or `most_rounds` were held.

    Args:
        measures: contestant -> function that calls it for about so many seconds and returns the time of each call.
        ours: the contestant whose speed-up is wanted.
        rounds: rounds that must count.
        seconds_per_turn: length of a turn.
        most_rounds: when to give up on a machine that does not become quiet.
        report: is told the contest so far after every round; the verdict on earlier rounds may change.
        pause: seconds between turns, in which the idle threads of the last contestant go to sleep.

    Returns:
        The contest; `valid_rounds` may be fewer than `rounds` if the machine was never quiet, but at least one counts.
    """
    others = tuple(name for name in measures if name != ours)
    held: list[Mapping[str, float]] = []
    while True:
        times = {}
        for name, measure in measures.items():
            time.sleep(pause)
            times[name] = statistics.median(measure(seconds_per_turn))
        held.append(times)
        contest = Contest(ours, others, judge(held, others))
        report(contest)
        if len(contest.valid_rounds) >= rounds or len(held) >= most_rounds:
            return contest


def judge(held: Sequence[Mapping[str, float]], others: Sequence[str]) -> tuple[Round, ...]:
    """Which rounds count: those in which no other contestant was slowed down. Our own times have no say in it."""
    shortest = {name: min(times[name] for times in held) for name in others}
    return tuple(Round(times, any(times[name] > CONTENDED * shortest[name] for name in others)) for times in held)
