"""Put what the scripts beside this one counted for TPUs into one compact file, and print the tables of docs/performance.md.

    python tests/aot/tpu_publish.py build/aot/tpu_*.json [--results benchmarks/results/tpu_static.json]

Files may come from several runs, of which each adds rows; where rows are of the same case, the last file's counts.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpu_programs import ROUTINGS

Row = dict[str, Any]
CASE = ("tpu", "model", "tokens", "program", "kernel", "arrays", "routing")
"""What tells rows apart, as far as they have it."""


def merged(files: Iterable[Path]) -> dict[str, Any]:
    """One result of all files: comparisons with megablox, programs on slices, and single kernels."""
    result: dict[str, Any] = {"static": True, "versions": {}, "tilings": {}}
    tables: dict[str, dict[str, Row]] = {"comparisons": {}, "slices": {}, "kernels": {}}
    for file in files:
        found = json.loads(file.read_text())
        result["versions"] |= found["versions"]
        result["tilings"] |= found.get("tilings", {})
        if "comparisons" in found:
            name, rows = "comparisons", found["comparisons"]
        else:
            name = "kernels" if file.name.startswith("tpu_kernels") else "slices"
            rows = [row for row in found["rows"] if "left_out" not in row]
        for row in rows:
            compact = {key: value for key, value in row.items() if key != "kept"}
            tables[name][str([row.get(key) for key in CASE])] = compact
    return result | {name: list(rows.values()) for name, rows in tables.items()}


def comparison_table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of Markdown: ours against megablox."""
    headings = (
        "TPU",
        "model",
        "tokens",
        "routing",
        "bundles, ours / megablox's",
        "its tiling",
        "occupancy",
        "spills/G",
    )
    yield f"| {' | '.join(headings)} |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["model"], row["tpu"], row["tokens"], ROUTINGS.index(row["routing"]))):
        ours, theirs = row["ours"], row["megablox"]
        numbers = (f"{row['ratio']:.2f}", "×".join(map(str, theirs["tiling"])))
        pairs = (
            f"{ours['occupancy']:.2f} / {theirs['occupancy']:.2f}",
            f"{ours['spills_per_billion_multiplies']:.0f} / {theirs['spills_per_billion_multiplies']:.0f}",
        )
        cells = (row["tpu"], row["model"], row["tokens"], row["routing"], *numbers, *pairs)
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Merge, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/tpu_static.json"))
    arguments = parser.parse_args()
    result = merged(arguments.files)
    lines = [
        f' "{name}": ' + (_rows(value) if isinstance(value, list) else json.dumps(value))
        for name, value in result.items()
    ]
    arguments.results.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(*comparison_table(result["comparisons"]), sep="\n")


def _rows(rows: list[Row]) -> str:
    """A line for each."""
    return "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]" if rows else "[]"


if __name__ == "__main__":
    main()
