"""`moe-jax verify`: does a copy of a checkpoint hold every number of its source?"""

import argparse
import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

if TYPE_CHECKING:
    from moe_jax.checkpoints import VerificationReport

SUMMARY = "compare a converted or exported checkpoint with its source"
DESCRIPTION = """\
Compare every value of SRC with OUT, bit by bit; each may be a Hugging Face folder or a converted one. Where OUT has another
dtype, SRC is rounded to it first. What their config.json say of how the model computes is compared, too. The exit status is 1 if
anything differs.
"""
EXAMPLES = """\
  moe-jax verify Qwen3-30B-A3B/ converted/
  moe-jax verify Qwen3-30B-A3B/ exported/ --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SRC", help="the original: a Hugging Face folder, a hub id (owner/name) or a converted folder"
    )
    parser.add_argument("output", metavar="OUT", help="the copy: a converted folder or a Hugging Face folder")
    shared.add_revision(parser)
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify; returns the exit status."""
    from moe_jax.checkpoints import verify
    from moe_jax.cli.output import print_json
    from moe_jax.cli.progress import byte_progress

    with byte_progress("comparing") as progress:
        report = verify(arguments.source, arguments.output, revision=arguments.revision, progress=progress)
    if arguments.json:
        differences = [
            {
                **dataclasses.asdict(difference),
                "largest": difference.largest if math.isfinite(difference.largest) else None,
            }
            for difference in report.differences
        ]
        print_json({**dataclasses.asdict(report), "ok": report.ok, "differences": differences})
    else:
        print_report(report)
    return exit_codes.SUCCESS if report.ok else exit_codes.CHECK_FAILED


def print_report(report: "VerificationReport") -> None:
    """Print a report as text."""
    from moe_jax.cli.output import format_bytes, print_facts, print_table

    counts = {"setting": len(report.settings), "tensor": len(report.differences)}
    different = [f"{count:,} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
    compared = f"{report.tensors:,} tensors, {format_bytes(report.nbytes)}"
    facts = [
        ("compared", compared if report.tensors else "no tensor: the models have different parameters"),
        ("different", " and ".join(different) or "none: every value is the same"),
    ]
    facts += [
        ("converted", f"{count:,} arrays {change}") for change, count in Counter(report.converted.values()).items()
    ]
    print_facts(f"{report.source} and {report.output}", facts)
    if report.settings:
        print_table("Settings that differ, by config.json", ["SRC against OUT"], [(one,) for one in report.settings])
    if report.differences:
        print_table(
            "Tensors that differ",
            ["tensor", "values", "largest difference"],
            [(difference.tensor, difference.values, difference.largest) for difference in report.differences],
        )
    if report.dropped:
        print_table("Tensors left out", ["tensor", "why"], report.dropped.items())
