"""`moe-jax export`: back to a Hugging Face folder."""

import argparse
import dataclasses

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

SUMMARY = "write a checkpoint as a Hugging Face folder"
DESCRIPTION = """\
Write a converted checkpoint as a Hugging Face folder (safetensors, config.json, tokenizer) that transformers loads. Experts are
stored as in the original checkpoint, one by one or fused, unless --form says otherwise. gpt-oss has only the fused form.
"""
EXAMPLES = """\
  moe-jax export converted/ exported/
  moe-jax export converted/ exported/ --form fused --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SRC", help="a converted folder, a Hugging Face folder or a hub id (owner/name)"
    )
    parser.add_argument("output", metavar="HF_DIR", help="the folder to create; its parent folder must exist")
    parser.add_argument(
        "--form",
        choices=("per_expert", "fused"),
        help="how experts are stored (default: as in the original checkpoint)",
    )
    shared.add_revision(parser)
    shared.add_dtype(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace HF_DIR, and discard unfinished work of another export"
    )
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit status."""
    from moe_jax.checkpoints import export
    from moe_jax.cli.output import format_bytes, format_seconds, print_facts, print_json
    from moe_jax.cli.progress import byte_progress

    with byte_progress("exporting") as progress:
        report = export(
            arguments.source,
            arguments.output,
            form=arguments.form,
            dtype=shared.dtype_named(arguments.dtype),
            overwrite=arguments.overwrite,
            revision=arguments.revision,
            progress=progress,
        )
    if arguments.json:
        print_json(dataclasses.asdict(report))
        return exit_codes.SUCCESS
    facts = [
        ("family", report.family),
        ("experts", "one by one" if report.form == "per_expert" else report.form),
        ("tensors", report.tensors),
        ("files", len(report.files)),
        ("size", format_bytes(report.nbytes)),
        ("time", format_seconds(report.seconds)),
    ]
    print_facts(f"Exported to {report.output}", facts)
    return exit_codes.SUCCESS
