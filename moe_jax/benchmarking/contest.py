"""Fair timing of contestants that live in different processes: they take turns, and disturbed rounds don't count."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

CONTENDED = 1.5
"""A round in which a contestant of the other side takes this many times its own shortest round is void."""


class WorkerProcess:
    """A process that answers requests, one JSON object per line on stdin and stdout."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str]):
        """Start `command` with exactly this environment."""
        self.command = list(command)
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
        )
        self._requests, self._answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)

    def request(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the process ended; what it printed to stderr has been shown.
        """
        try:
            self._requests.write(json.dumps({"action": action, **arguments}) + "\n")
            self._requests.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"worker ended with code {self._process.wait()} at {action!r}: {' '.join(self.command)}")
        return json.loads(answer)

    def close(self) -> None:
        """Let the process end."""
        self._requests.close()
        self._process.wait()


@contextlib.contextmanager
def worker(command: Sequence[str], *, environment: Mapping[str, str]) -> Iterator[WorkerProcess]:
    """A `WorkerProcess` that ends with the block."""
    process = WorkerProcess(command, environment=environment)
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
