"""What commands print: results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class ResultConsole(Console):
    """A console on standard output whose reader may go away: `main` knows what to do then."""

    def on_broken_pipe(self) -> None:
        """Called while the BrokenPipeError is handled; without this, rich would end the process."""
        raise


def stdout_console() -> Console:
    """For results. Colours only on a terminal, and not with NO_COLOR."""
    return ResultConsole(file=sys.stdout, highlight=False)


def stderr_console() -> Console:
    """For progress and remarks."""
    return Console(file=sys.stderr, highlight=False)


def print_json(value: Any) -> None:
    """Print `value` as one JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_path_as_text))


def _path_as_text(value: Any) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")


def remark(message: str) -> None:
    """A line on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; columns whose values are all numbers are aligned right, long texts are folded, never cut."""
    rows = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(value)) for value in row))
    console = stdout_console()
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    console.print(table)


def print_facts(title: str, facts: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, one pair per line."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    console = stdout_console()
    console.print(Text(title, style="bold"), soft_wrap=True)
    for name, value in facts:
        console.print(Text.assemble("  ", (f"{name:<{width}}", "cyan"), "  ", format_value(value)), soft_wrap=True)


def format_value(value: Any) -> str:
    """Numbers with thousands separated, everything else as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def format_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it: 1.50 GB is 1.5e9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        shown = f"{count:.0f}" if unit == "B" else f"{count:.2f}"
        if abs(float(shown)) < 1000:  # rounded: no 1000.00 kB
            return f"{shown} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_seconds(seconds: float) -> str:
    """A duration: 0.12 s, 34 s, 2 min 05 s."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)  # rounded: no 60 s
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s"
