"""The GPU suite's results: judged against the bars, as a table for `docs/performance.md`, and as JSON."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""One contestant's measurement of one case; see `gpu_suite.Suite._measure` for the keys."""

OURS = "moe_jax pallas_gpu"
BEGIN, END = "<!-- gpu suite: begin -->", "<!-- gpu suite: end -->"
LARGE_WEIGHTS = 256e6
"""Bytes of touched weights from which the bar on bandwidth holds."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One figure that is asked for, and what was measured."""

    what: str
    wanted: float
    measured: float | None
    """The worst of its cells; None if none was measured."""
    where: str = ""
    """The cell of the worst."""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the worst cell meets it; None if there is none."""
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def bars(rows: Iterable[Row]) -> list[Bar]:
    """What the kernels are asked to reach, against the rows measured."""
    right = [row for row in rows if row.get("seconds") is not None]
    own = [row for row in right if row["contestant"] == OURS]
    forward = [row for row in own if row["kind"] == "forward"]
    backward = [row for row in own if row["kind"] == "backward"]
    uniform = [row for row in forward if row["routing"] == "uniform"]
    return [
        _worst(
            "forward, 512 rows per expert and more", 0.80, uniform, "matmul_share", lambda row: row["mean_rows"] >= 512
        ),
        _worst(
            "forward, 256 rows per expert", 0.70, uniform, "matmul_share", lambda row: 256 <= row["mean_rows"] < 512
        ),
        _worst("decode, over 256 MB of weights", 0.85, forward, "bandwidth_share", _is_large_decode),
        _worst("backward", 0.65, backward, "matmul_share", lambda row: row["mean_rows"] >= 512),
        dataclasses.replace(
            _worst("weight gradient over row gradient", 1.3, backward, "gradient_ratio", largest=True),
            at_most=True,
        ),
        *(
            _worst(f"whole block over {rival}{how}", 1.2, _against(forward, right, rival, key), "speedup")
            for rival in ("tokamax.ragged_dot", "torch grouped_mm")
            for how, key in (("", "call_seconds"), (", in one program", "in_program_seconds"))
        ),
    ]


def _is_large_decode(row: Row) -> bool:
    return row["mean_rows"] <= 8 and row["weight_bytes"] > LARGE_WEIGHTS


def _against(own: Sequence[Row], rows: Sequence[Row], rival: str, key: str) -> list[Row]:
    """Our rows with their speed-up over a rival, where both were measured in the same way: queued calls, or one program."""
    theirs = {row["case"]: row[key] for row in rows if row["contestant"] == rival and row.get(key)}
    return [{**row, "speedup": theirs[row["case"]] / row[key]} for row in own if row.get(key) and row["case"] in theirs]


def _worst(
    what: str, wanted: float, rows: Iterable[Row], key: str, counts: Any = None, *, largest: bool = False
) -> Bar:
    found = [(row[key], row["case"]) for row in rows if row.get(key) is not None and (counts is None or counts(row))]
    if not found:
        return Bar(what, wanted, None)
    value, where = (max if largest else min)(found)
    return Bar(what, wanted, value, where)


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, without markers."""
    ceilings, rows = result["ceilings"], result["rows"]
    lines = [
        f"{result['device']}, {result['date']}, jax {result['versions']['jax']}; `{result['command']}`.",
        "",
        _ceilings(ceilings),
        "",
        *_table(
            ("asked for", "bar", "worst measured", "where", ""),
            [
                (
                    bar.what,
                    f"{'≤' if bar.at_most else '≥'} {bar.wanted:g}",
                    _number(bar.measured),
                    bar.where,
                    {True: "met", False: "**missed**", None: "not measured"}[bar.met],
                )
                for bar in bars(rows)
            ],
        ),
    ]
    for title, kind, columns in _TABLES:
        chosen = [row for row in rows if row["kind"] == kind[0] and kind[1](row)]
        if chosen:
            body = [tuple(format_cell(row) for _, format_cell in columns) for row in chosen]
            lines += ["", f"### {title}", "", *_table(tuple(name for name, _ in columns), body)]
    failures = [_failure(row) for row in rows if row.get("failed")]
    failures += [(step, "", _in_a_cell(why)) for step, why in result.get("failed_steps", {}).items()]
    if failures:
        lines += ["", "### Failed", "", *_table(("case", "contestant", "why"), failures)]
    if result["not_reached"]:
        lines += ["", f"Not reached in the time: {len(result['not_reached'])} cases."]
    return "\n".join(lines)


def summary(row: Mapping[str, Any]) -> str:
    """One line on the terminal."""
    if row.get("failed"):
        return f"FAILED: {row['failed'].splitlines()[0][:160]}"
    parts = [f"{row['call_seconds'] * 1e6:10,.1f} µs a call"]
    if row.get("busy_seconds") is not None:
        parts.append(f"{row['busy_seconds'] * 1e6:10,.1f} µs of kernels")
    if row["mean_rows"] > 8:
        share, name = row.get("matmul_share", row.get("block_share")), "of dense"
    else:
        share, name = row.get("bandwidth_share"), "of copy"
    if share is not None:
        parts.append(f"{100 * share:5.1f} % {name}")
    if row.get("waits_for_host"):
        parts.append(f"host waits: {', '.join(row['waits_for_host'])}")
    return ", ".join(parts)


def _ceilings(ceilings: Mapping[str, Any] | None) -> str:
    if ceilings is None:
        return "The device's ceilings could not be measured."
    return (
        f"Ceilings measured in this run: dense bf16 matmul {ceilings['dense_flops'] / 1e12:.0f} TFLOP/s,"
        f" copy {ceilings['copy_bytes'] / 1e12:.2f} TB/s, launching an empty program"
        f" {ceilings['launch_seconds'] * 1e6:.1f} µs. Times are {ceilings['timer']}."
    )


def _failure(row: Row) -> tuple[str, ...]:
    return row["case"], row["contestant"], _in_a_cell(row["failed"])


def _in_a_cell(why: str) -> str:
    return why.splitlines()[0].replace("|", "\\|")[:160]


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _percent(key: str) -> Any:
    return lambda row: "" if row.get(key) is None else f"{100 * row[key]:.0f} %"


def _micro(key: str) -> Any:
    return lambda row: "" if row.get(key) is None else f"{row[key] * 1e6:,.1f}"


_CASE = [
    ("shape", lambda row: row["shape"]),
    ("T", lambda row: str(row["tokens"])),
    ("routing", lambda row: row["routing"]),
    ("rows per expert", lambda row: _number(row["mean_rows"])),
    ("contestant", lambda row: row["contestant"]),
]
_TIMES = [("call µs", _micro("call_seconds")), ("kernels µs", _micro("busy_seconds"))]
_TABLES = [
    (
        "Forward, more than 8 rows per expert (share of the dense rate)",
        ("forward", lambda row: row["mean_rows"] > 8 and not row.get("failed")),
        [
            *_CASE,
            *_TIMES,
            ("matmuls", _percent("matmul_share")),
            ("whole block", _percent("block_share")),
            ("ceiling, 128-row tiles", _percent("ceiling_128")),
            ("64-row tiles", _percent("ceiling_64")),
            ("waves of tiles", _percent("ceiling_waves")),
        ],
    ),
    (
        "Decode, up to 8 rows per expert (share of the copy bandwidth)",
        ("forward", lambda row: row["mean_rows"] <= 8 and not row.get("failed")),
        [
            *_CASE,
            *_TIMES,
            ("in one program µs", _micro("in_program_seconds")),
            ("weights MB", lambda row: _number(row["weight_bytes"] / 1e6, ",.0f")),
            ("split in", lambda row: " / ".join(str(splits) for splits in (row.get("splits") or {}).values())),
            ("second pass µs", _micro("second_pass_seconds")),
            ("matmuls", _percent("bandwidth_share")),
        ],
    ),
    (
        "Forward and backward (share of the dense rate)",
        ("backward", lambda row: not row.get("failed")),
        [
            *_CASE,
            *_TIMES,
            ("matmuls", _percent("matmul_share")),
            ("row gradient µs", _micro("rows_gradient_seconds")),
            ("weight gradient µs", _micro("weights_gradient_seconds")),
            ("ratio", lambda row: _number(row.get("gradient_ratio"))),
        ],
    ),
]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def replace_between_markers(text: str, inside: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must hold {BEGIN} and after it {END}, once each")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return f"{before}\n{inside}\n{after}"


def write_text(file: Path, text: str) -> None:
    """All of it, or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, suffix=".part", delete=False) as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, file)


def write_results(result: Mapping[str, Any], *, folder: Path, page: Path) -> Path:
    """Write `gpu_<device>.json` into the folder and the tables into the page; the JSON file.

    Raises:
        ValueError: a rehearsal, whose times mean nothing, or a page without markers.
    """
    if result["rehearsal"]:
        raise ValueError("a rehearsal's times mean nothing and are not written into the results")
    text = replace_between_markers(page.read_text(encoding="utf-8"), markdown(result))
    file = folder / f"gpu_{result['device_name']}.json"
    write_text(file, json.dumps(result, indent=1) + "\n")
    write_text(page, text)
    return file
