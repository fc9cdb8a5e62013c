"""What a run of the GPU suite has found so far, in a file that is up to date whatever happens to the run."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.benchmarking.gpu_programs import FAILURES, describe_failure
from moe_jax.benchmarking.gpu_report import bars, write_text
from moe_jax.benchmarking.watchdog import HUNG, watch


@dataclasses.dataclass
class Record:
    """The result as it grows, and its file."""

    result: dict[str, Any]
    """What is known beforehand; grows. See `gpu_report.markdown` for the keys."""
    file: Path | None
    """None: it is not written."""
    cases: tuple[str, ...] = ()
    """Names of those that are to be measured."""
    report: Callable[[str], None] = print
    publish: Callable[[], None] = lambda: None
    """Shows the tables and writes what else is to be written in the end; called too if the process has to be ended."""

    def __post_init__(self) -> None:
        self.result |= {"rows": [], "unable": {}, "launches": [], "failed_steps": {}}

    def save(self) -> None:
        """Write it, with what follows from the rows."""
        rows = self.result["rows"]
        begun = {row["case"] for row in rows}
        self.result["bars"] = [{**dataclasses.asdict(bar), "met": bar.met} for bar in bars(rows)]
        self.result["not_reached"] = [name for name in self.cases if name not in begun]
        if self.file is not None:
            write_text(self.file, json.dumps(self.result, indent=1) + "\n")

    def watch(self, what: str, seconds: float, status: int = HUNG) -> contextlib.AbstractContextManager[None]:
        """Give a block so many seconds; then what there is is saved and published, and the process ended with this status."""
        return watch(what, seconds, self._last_words, status)

    def _last_words(self, why: str) -> None:
        self.result["failed_steps"]["ended early"] = why
        self.save()
        self.report(f"ENDED EARLY, {why}; what was measured is in {self.file}")
        self.publish()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A part of the run whose failure is recorded and does not cost the other parts."""
        try:
            yield
        except FAILURES as error:
            self.result["failed_steps"][name] = describe_failure(error)
            self.report(f"{name} FAILED: {describe_failure(error)}")
        self.save()

    @property
    def failures(self) -> list[str]:
        """What failed or was wrong, in words; none if all is well."""
        failed = [f"{name}: {why}" for name, why in self.result["failed_steps"].items()]
        failed += [f"retraced: {launch}" for launch in self.result["launches"] if launch["programs"] != 1]
        failed += [
            f"{row['case']}, {row['contestant']}: {row['failed']}" for row in self.result["rows"] if row["failed"]
        ]
        return failed
