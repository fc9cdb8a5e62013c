"""Compare our grouped matmul with megablox, the one that comes with jax, for TPUs that this machine lacks.

    python tests/aot/tpu_megablox.py [--tpus v6e] [--models qwen3-30b-a3b] [--search] [--full-units]

Gate and up of a model are one grouped matmul of rows that are sorted already. megablox is compiled with every tiling of one list
that fits, may cut the contracted dimension, and may use as much vector memory as ours; the tiling counts with which it executes
fewest bundles for the rows that groups have. Ours is compiled with the tiles that it chooses for itself, and with `--search`
with the same list too (it never cuts the contracted dimension). With `--full-units` it is compiled once more, so that it never
multiplies fewer rows at once than a matrix unit has: matmul slots are full then, at the price of products that nobody needs. All
are counted for the same sizes of groups, by the same reader. All of it is static: it tells no time.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpu_children import CHILD_OPTION, Job, Row, rows_of_children, run_as_child
from tpu_counts import counted, versions
from tpu_options import add_run_options, add_selection_options
from tpu_programs import ROUTINGS, Tiling, matmul_calls, matmul_columns, useful_multiplies

from moe_jax.aot.targets import TpuTarget
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, ExpertShape
from moe_jax.kernels.mosaic_tpu.limits import vmem_limit_bytes

TOKENS = (2048, 8192)
TILE_ROWS = (128, 256)
MOST_TILE_ELEMENTS = 2**22
"""Of a tile of weights. All of a tile is code of its own: larger ones take the compiler minutes."""


def tilings(shape: ExpertShape) -> Iterator[Tiling]:
    """The list: the contracted dimension whole or in halves, with the two widest equal parts of the columns, up to 2048.

    Narrower parts repeat more: rows are read, and results accumulated, more often. Parts are multiples of the widest matrix unit's
    columns, or else of a register's; halves that are not, are none.
    """
    width, depth = matmul_columns(shape), shape.hidden_size
    unit = 256 if width % 256 == 0 else 128
    parts = [width // number for number in range(1, width // 512 + 1) if width % (unit * number) == 0]
    depths = [depth, depth // 2] if depth % 256 == 0 else [depth]
    for rows, depth in itertools.product(TILE_ROWS, depths):
        fitting = [columns for columns in parts if columns <= 2048 and depth * columns <= MOST_TILE_ELEMENTS]
        yield from ((rows, depth, columns) for columns in fitting[:2])


def megablox_vmem_bytes(tiling: Tiling) -> int:
    """Blocks of rows, weights and results twice each, and the sums, of bfloat16 operands."""
    rows, depth, columns = tiling
    return 2 * 2 * (rows * depth + depth * columns + rows * columns) + 4 * rows * columns


def rows_of(job: Job, dumps: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for the grouped matmul."""
    target = TpuTarget.named(job["tpu"])
    model, program, tiling = job["model"], job["program"], job["tiling"]
    # The code is that for most tokens; fewer only give it other tables.
    tokens = job["tokens"]
    calls = {
        f"{routing} {number}": call
        for number in tokens
        for routing, call in matmul_calls(target, model, number, program, tiling and tuple(tiling)).items()
    }
    calls = dict(sorted(calls.items(), key=lambda named: -sum(a.shape[0] for a in named[1].operands if a.shape)))
    if program == "megablox":
        limit = vmem_limit_bytes(target.device)
        calls = {name: call.with_vmem_limit(limit) for name, call in calls.items()}
    useful = {name: useful_multiplies(model, int(name.split()[1]), name.split()[0], calls[name]) for name in calls}
    alone = {name: [call] for name, call in calls.items()}
    yield counted(target, alone, useful, dumps=dumps, kept=Path(job["kept"]), deadline=deadline)


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Ours with its own choice for each number of tokens, and what is searched."""
    kept = str(arguments.output / "tpu_kept")
    for tpu, model in itertools.product(arguments.tpus, arguments.models):
        job = {"tpu": tpu, "model": model, "kept": kept}
        limit = vmem_limit_bytes(TpuTarget.named(tpu).device)
        for tokens in arguments.tokens:
            for program in ["grouped", "full units"] if arguments.full_units else ["grouped"]:
                yield {**job, "program": program, "tokens": [tokens], "tiling": None}
        for tiling in tilings(EXPERT_SHAPES[model]):
            if tiling[0] not in arguments.rows:
                continue
            if megablox_vmem_bytes(tiling) <= limit:
                yield {**job, "program": "megablox", "tokens": arguments.tokens, "tiling": tiling}
            if arguments.search and tiling[1] == EXPERT_SHAPES[model].hidden_size:
                yield {**job, "program": "grouped", "tokens": arguments.tokens, "tiling": tiling}


def comparisons(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Ours as chosen, and otherwise as far as that was asked for, and megablox at its best, for each shape and routing."""
    results = [row for row in rows if "code_bundles" in row]
    names = sorted({(row["tpu"], row["model"], tokens) for row in results for tokens in row["tokens"]})
    for (tpu, model, tokens), routing in itertools.product(names, ROUTINGS):
        name = f"{routing} {tokens}"
        found = [row for row in results if (row["tpu"], row["model"]) == (tpu, model) and name in row]
        sides: dict[str, dict[str, Any]] = {}
        for side, wanted in {
            "ours": [row for row in found if row["program"] == "grouped" and row["tiling"] is None],
            "ours searched": [row for row in found if row["program"] == "grouped" and row["tiling"] is not None],
            "ours with full units": [row for row in found if row["program"] == "full units"],
            "megablox": [row for row in found if row["program"] == "megablox"],
        }.items():
            if wanted:
                least = min(wanted, key=lambda row: row[name]["bundles"])
                sides[side] = {"tiling": least["tiling"], **least[name]}
        if {"ours", "megablox"} <= sides.keys():
            ratio = round(sides["ours"]["bundles"] / sides["megablox"]["bundles"], 4)
            yield {"tpu": tpu, "model": model, "tokens": tokens, "routing": routing, "ratio": ratio, **sides}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection_options(parser, legal_models=EXPERT_SHAPES, tokens=TOKENS, programs=False)
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=list(TILE_ROWS),
        choices=TILE_ROWS,
        help="rows of megablox's tiles (default: both)",
    )
    parser.add_argument("--search", action="store_true", help="also compile ours with the whole list of tilings")
    parser.add_argument(
        "--full-units", action="store_true", help="also compile ours with no fewer rows than a matrix unit has"
    )
    add_run_options(parser)
    return parser.parse_args()


def main() -> int:
    """Compile, print, and say whether all of ours compiled."""
    if CHILD_OPTION in sys.argv:
        run_as_child(sys.argv[sys.argv.index(CHILD_OPTION) + 1 :], rows_of)
        return 0
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    listed = {
        model: [tiling for tiling in tilings(EXPERT_SHAPES[model]) if tiling[0] in arguments.rows]
        for model in arguments.models
    }
    for model, each in listed.items():
        print(f"{model}: tilings (rows, contracted, columns):", *each)
    rows = rows_of_children(
        __file__,
        jobs(arguments),
        processes=arguments.processes,
        minutes=arguments.minutes,
        verbose=arguments.verbose,
    )
    compared = [*comparisons(rows)]
    result = {
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "static": True,
        "tilings": listed,
        "rows": rows,
        "comparisons": compared,
    }
    (arguments.output / "tpu_megablox.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in compared:
        ours, theirs = row["ours"], row["megablox"]
        print(
            f"{row['tpu']} {row['model']} {row['tokens']} tokens, {row['routing']}: {row['ratio']:.3f} of megablox's bundles"
            f" ({ours['bundles']}; {theirs['bundles']} with {theirs['tiling']}); occupancy {ours['occupancy']} /"
            f" {theirs['occupancy']}, spills per billion multiplies {ours['spills_per_billion_multiplies']} /"
            f" {theirs['spills_per_billion_multiplies']}"
        )
        for side in ("ours searched", "ours with full units"):
            if other := row.get(side):
                tiling = f" {other['tiling']}" if other["tiling"] else ""
                print(
                    f"    {side}{tiling}: {other['bundles'] / theirs['bundles']:.3f} ({other['bundles']}), occupancy"
                    f" {other['occupancy']}, spills per billion multiplies {other['spills_per_billion_multiplies']}"
                )
    failures = [row for row in rows if "failure" in row]
    for row in failures:
        print("FAILED", row["tpu"], row["model"], row["program"], row["tiling"], row["failure"])
    left_out = sum("left_out" in row for row in rows)
    print(f"{versions()}: {len(rows) - left_out} rows, {left_out} left out, in {time.perf_counter() - started:.0f} s")
    return 1 if any(row["program"] == "grouped" and row["tiling"] is None for row in failures) or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
