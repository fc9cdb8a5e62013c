"""`moe-jax bench`: measure on this machine."""

import argparse
import dataclasses

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

SUMMARY = "measure speed on this machine"
DESCRIPTION = """\
Measure on this machine. Compiling is measured apart, and every round is shown: rounds that differ much mean that something else
was running.
"""
EXAMPLES = """\
  moe-jax bench generate examples/demo_model
  moe-jax bench generate MODEL --batch 8 --prompt-tokens 512 --new-tokens 128 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    benchmarks = parser.add_subparsers(title="benchmarks", dest="benchmark", metavar="BENCHMARK", required=True)
    generation = benchmarks.add_parser(
        "generate",
        help="prompt tokens and new tokens per second of a model",
        description="Read random prompts and continue them greedily, in rounds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model(generation)
    generation.add_argument("--batch", type=shared.positive_int, default=1, metavar="N", help="prompts (default: 1)")
    generation.add_argument(
        "--prompt-tokens", type=shared.positive_int, default=128, metavar="N", help="tokens per prompt (default: 128)"
    )
    generation.add_argument(
        "--new-tokens", type=shared.positive_int, default=64, metavar="N", help="tokens to generate (default: 64)"
    )
    generation.add_argument("--rounds", type=shared.positive_int, default=5, metavar="N", help="rounds (default: 5)")
    shared.add_dtype(generation)
    shared.add_json(generation)
    generation.set_defaults(run_benchmark=run_generation)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen benchmark; returns the exit status."""
    return arguments.run_benchmark(arguments)


def run_generation(arguments: argparse.Namespace) -> int:
    """`bench generate`."""
    import jax

    from moe_jax.benchmarking.generation_speed import measure_generation
    from moe_jax.cli.output import format_seconds, print_facts, print_json, print_table
    from moe_jax.pretrained import from_pretrained

    model = from_pretrained(arguments.model, dtype=shared.dtype_named(arguments.dtype))
    speed = measure_generation(
        model,
        batch_size=arguments.batch,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
    )
    device = jax.devices()[0]
    medians = {
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
    }
    if arguments.json:
        print_json(
            {
                "model": arguments.model,
                "dtype": model.dtype.name,
                "device": device.device_kind,
                "platform": device.platform,
                "jax": jax.__version__,
                **dataclasses.asdict(speed),
                **medians,
            }
        )
        return exit_codes.SUCCESS
    print_facts(
        f"{arguments.model}, {model.dtype.name}, on {device.device_kind}",
        [
            ("prompts", f"{arguments.batch} of {arguments.prompt_tokens:,} tokens, {arguments.new_tokens:,} new ones each"),
            ("compiling", format_seconds(speed.compile_seconds)),
            ("prefill", f"{speed.prefill_tokens_per_second:,.1f} tokens/s (median)"),
            ("decode", f"{speed.decode_tokens_per_second:,.1f} tokens/s (median)"),
        ],
    )
    print_table(
        "Rounds",
        ["round", "prefill tokens/s", "decode tokens/s"],
        [
            (number, timing.prefill_tokens_per_second, timing.decode_tokens_per_second)
            for number, timing in enumerate(speed.rounds, start=1)
        ],
    )
    return exit_codes.SUCCESS
