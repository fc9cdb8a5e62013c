"""`moe-jax convert`: a Hugging Face checkpoint into a folder of Orbax parts."""

import argparse
import dataclasses

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

SUMMARY = "convert a Hugging Face checkpoint to Orbax"
DESCRIPTION = """\
Convert the safetensors of a Hugging Face checkpoint into a folder of Orbax parts, from which every host reads only its share.
It streams, so memory stays small whatever the model's size. If it is interrupted, run the same command again to resume it;
unfinished work is in OUT.incomplete.

A converted folder may be converted again, with another --dtype or other --shards.
"""
EXAMPLES = """\
  moe-jax convert Qwen3-30B-A3B/ converted/
  moe-jax convert Qwen/Qwen3-30B-A3B converted/ --dtype bfloat16
  moe-jax convert DeepSeek-V3/ converted/ --shards 16
  moe-jax convert Mixtral-8x7B/ converted/ --overwrite
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SRC", help="a Hugging Face folder, a hub id (owner/name) or a converted folder"
    )
    parser.add_argument("output", metavar="OUT", help="the folder to create; its parent folder must exist")
    shared.add_revision(parser)
    shared.add_dtype(parser)
    parser.add_argument(
        "--shards",
        type=shared.positive_int,
        default=1,
        metavar="N",
        help="lay the output out for N devices that share the model (expert times tensor axis), so that hosts read only their "
        "share (default: 1)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT, and discard unfinished work of another conversion"
    )
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit status."""
    from moe_jax.checkpoints import convert
    from moe_jax.cli.output import format_bytes, format_seconds, print_facts, print_json, print_table, remark
    from moe_jax.cli.progress import byte_progress

    try:
        with byte_progress("converting") as progress:
            report = convert(
                arguments.source,
                arguments.output,
                dtype=shared.dtype_named(arguments.dtype),
                shards=arguments.shards,
                overwrite=arguments.overwrite,
                revision=arguments.revision,
                progress=progress,
            )
    except KeyboardInterrupt:
        remark("the finished parts are kept; run the same command again to go on from them")
        raise
    if arguments.json:
        print_json(dataclasses.asdict(report))
        return exit_codes.SUCCESS
    rate = format_bytes(report.nbytes / max(report.seconds, 1e-9))
    resumed = f" ({report.parts_resumed:,} from an interrupted run)" if report.parts_resumed else ""
    facts = [
        ("family", report.family),
        ("arrays", report.arrays),
        ("parts", f"{report.parts:,}{resumed}"),
        ("size", f"{format_bytes(report.nbytes)} ({', '.join(report.dtype_bytes)})"),
        ("time", format_seconds(report.seconds) + ("" if report.parts_resumed else f" ({rate}/s)")),
    ]
    if report.quantization:
        facts.append(("decoded from", report.quantization))
    print_facts(f"Converted to {report.output}", facts)
    if report.dropped:
        print_table("Tensors left out", ["tensor", "why"], report.dropped.items())
    return exit_codes.SUCCESS
