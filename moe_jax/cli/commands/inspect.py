"""`moe-jax inspect`: what is in a checkpoint."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

if TYPE_CHECKING:
    from moe_jax.checkpoints import Summary

SUMMARY = "show what is in a checkpoint"
DESCRIPTION = """\
Show what a checkpoint holds: family, layers, experts, parameters, number formats. Only headers and file sizes are
read (of a model on the hub only config.json and the headers are downloaded), and every tensor is accounted for: an incomplete
checkpoint is refused with a list of what is wrong. Number formats are those in which parameters
are loaded; quantized ones are decoded.
"""
EXAMPLES = """\
  moe-jax inspect examples/demo_model
  moe-jax inspect Qwen/Qwen3-30B-A3B
  moe-jax inspect CONVERTED --json
"""

KINDS = {"huggingface": "Hugging Face folder", "converted": "converted folder"}
FORMS = {"per_expert": "experts stored one by one", "fused": "experts fused"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    shared.add_model(parser)
    shared.add_revision(parser)
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Inspect; returns the exit status."""
    from moe_jax.checkpoints import inspect
    from moe_jax.cli.output import print_json

    summary = inspect(arguments.model, revision=arguments.revision)
    if arguments.json:
        print_json(dataclasses.asdict(summary))
    else:
        print_summary(summary)
    return exit_codes.SUCCESS


def print_summary(summary: "Summary") -> None:
    """Print a summary as text."""
    from moe_jax.cli.output import format_bytes, print_facts, print_table

    experts = "none"
    if summary.experts:
        experts = f"{summary.experts}, of which {summary.experts_per_token} per token, width {summary.expert_intermediate_size}"
    facts = [
        ("family", f"{summary.family} ({summary.architecture})"),
        ("what", f"{KINDS[summary.kind]}, {FORMS[summary.form]}"),
        ("layers", f"{summary.layers}, of which {summary.moe_layers} with experts"),
        ("experts", experts),
        ("shared experts", f"width {summary.shared_intermediate_size}" if summary.shared_intermediate_size else "none"),
        ("hidden size", summary.hidden_size),
        ("vocabulary", f"{summary.vocab_size:,}" + (" (tied embeddings)" if summary.tied_embeddings else "")),
        ("positions", summary.max_positions),
        ("parameters", f"{summary.parameters:,}, of which {summary.active_parameters:,} work on a token"),
        ("quantization", summary.quantization or "none"),
        ("size", f"{format_bytes(summary.nbytes)} in {summary.files:,} {'file' if summary.files == 1 else 'files'}"),
    ]
    print_facts(str(summary.folder), facts)
    print_table("Number formats when loaded", ["format", "parameters"], summary.dtypes.items())
    if summary.dropped:
        print_table("Tensors left out", ["tensor", "why"], summary.dropped.items())
