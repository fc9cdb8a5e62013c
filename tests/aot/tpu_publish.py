"""Put what the scripts beside this one counted for TPUs into one compact file, and print the tables of docs/performance.md.

    python tests/aot/tpu_publish.py build/aot/tpu_*.json [--results benchmarks/results/tpu_static.json]

Files may come from several runs, of which each adds rows to what was published before; where rows are of the same case, the last
file's counts.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpu_programs import ROUTINGS

Row = dict[str, Any]
CASE = ("tpu", "model", "tokens", "program", "kernel", "arrays", "routing", "layout", "digest")
"""What tells rows apart, as far as they have it."""
DIGEST_LETTERS = 12
TABLES = {
    "tpu_megablox": "comparisons",
    "tpu_slices": "slices",
    "tpu_kernels": "kernels",
    "tpu_compiles": "compiled",
    "tpu_weight_copies": "weight_copies",
}
"""The table that rows of a file belong to, by the beginning of the file's name."""


def merged(files: Iterable[Path], published: Path | None = None) -> dict[str, Any]:
    """One result of all files: a table for each script.

    Args:
        files: what scripts wrote.
        published: a result of before, to which they add.

    Raises:
        ValueError: a file is named like that of no script.
    """
    result: dict[str, Any] = {"static": True, "versions": {}, "tilings": {}}
    tables: dict[str, dict[str, Row]] = {table: {} for table in TABLES.values()}

    def add(found: dict[str, Any], rows: dict[str, list[Row]]) -> None:
        result["versions"] |= found["versions"]
        result["tilings"] |= found.get("tilings", {})
        for table, of_table in rows.items():
            for row in of_table:
                if "left_out" not in row:
                    compact = {key: value for key, value in row.items() if key != "kept"}
                    tables[table][str([row.get(key) for key in CASE])] = compact

    if published is not None:
        found = json.loads(published.read_text())
        # What failed before may have been put right; if not, it fails again.
        add(found, {name: [row for row in found.get(name, []) if "failure" not in row] for name in tables})
    for file in files:
        table = next((table for prefix, table in TABLES.items() if file.name.startswith(prefix)), None)
        if table is None:
            raise ValueError(f"the name of a file must begin with one of {', '.join(TABLES)}, got {file.name}")
        found = json.loads(file.read_text())
        add(found, {table: found["comparisons" if table == "comparisons" else "rows"]})
    rows = {table: list(rows.values()) for table, rows in tables.items()}
    return result | rows | {"compiled": list(different_kernels(rows["compiled"]))}


def different_kernels(rows: Iterable[Row]) -> Iterator[Row]:
    """A row for each kernel that compiled, and the programs that have it; failures as they are.

    Rows with "programs" were published before. Of programs that were compiled again, only the new rows count.
    """
    rows = list(rows)
    compiled_again = {(row["tpu"], _program(row)) for row in rows if "programs" not in row}
    kernels: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "failure" in row:
            yield row
            continue
        published = [name for name in row.get("programs", []) if (row["tpu"], name) not in compiled_again]
        programs = published if "programs" in row else [_program(row)]
        if programs:
            kept = {key: row[key] for key in ("tpu", "kernel", "arrays", "vmem_bytes", "seconds")}
            digest = row["digest"][:DIGEST_LETTERS]
            kernel = kernels.setdefault((row["tpu"], digest), kept | {"digest": digest, "programs": []})
            kernel["programs"] = list(dict.fromkeys([*kernel["programs"], *programs]))
    yield from kernels.values()


def _program(row: Row) -> str:
    return f"{row['model']} {row['tokens']} {row['program']}"


def comparison_table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of Markdown: ours against megablox, with figures of both routings side by side."""
    found = {(row["tpu"], row["model"], row["tokens"], row["routing"]): row for row in rows}
    headings = [
        "TPU",
        "model",
        "tokens",
        "bundles, ours / megablox's",
        "occupancy, ours",
        "spills/G, ours / megablox's",
    ]
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for tpu, model, tokens in sorted({key[:3] for key in found}):
        both = [row for routing in ROUTINGS if (row := found.get((tpu, model, tokens, routing))) is not None]
        spills = ([row[side]["spills_per_billion_multiplies"] for row in both] for side in ("ours", "megablox"))
        cells = (
            ", ".join(f"{row['ratio']:.2f}" for row in both),
            ", ".join(f"{row['ours']['occupancy']:.3f}" for row in both),
            " / ".join(", ".join(f"{figure:.0f}" for figure in figures) for figures in spills),
        )
        yield f"| {' | '.join(map(str, (tpu, model, tokens, *cells)))} |"


def main() -> None:
    """Merge, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what the scripts wrote, tpu_*.json")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results/tpu_static.json"),
        metavar="FILE",
        help="what was published, to which rows are added (default: %(default)s)",
    )
    arguments = parser.parse_args()
    result = merged(arguments.files, arguments.results if arguments.results.exists() else None)
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
