"""`moe-jax bench`: measure on this machine."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes

if TYPE_CHECKING:
    from moe_jax.benchmarking.generation_speed import GenerationSpeed
    from moe_jax.benchmarking.moe_block_speed import MoEBlockSpeed

SUMMARY = "measure speed on this machine"
DESCRIPTION = """\
Measure on this machine. Compile time is reported separately, and every round is shown: rounds that differ a lot mean that
something else was running.
"""
EXAMPLES = """\
  moe-jax bench moe-block
  moe-jax bench moe-block --experts 8 --top-k 2 --intermediate-size 3584 --tokens 1 --tokens 512
  moe-jax bench generate examples/demo_model
  moe-jax bench generate MODEL --batch 8 --prompt-tokens 512 --new-tokens 128 --json
  moe-jax bench gpu-kernels --shape qwen3-30b-a3b --tokens 8192
  moe-jax bench gpu-kernels --shape qwen3-30b-a3b --tokens 8192 --tune
"""

DEFAULT_TOKENS = (1, 16, 128, 512, 2048)
DEFAULT_KERNEL_TOKENS = (8, 8192)

# The names of moe_jax.benchmarking.expert_shapes.EXPERT_SHAPES, which is slow to import.
SHAPES = (
    "mixtral-8x7b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "deepseek-v3",
    "deepseek-v3-ep8",
    "deepseek-v3-ep32",
    "deepseek-v3-ep64",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "olmoe-1b-7b",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    benchmarks = parser.add_subparsers(title="benchmarks", dest="benchmark", metavar="BENCHMARK", required=True)
    generation = benchmarks.add_parser(
        "generate",
        help="prompt tokens and new tokens per second of a model",
        description="Read random prompts and continue them greedily, in rounds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    block = benchmarks.add_parser(
        "moe-block",
        help="time of one MoE layer, by number of tokens",
        description="Run one layer with random weights on random tokens, in rounds.",
    )
    kernels = benchmarks.add_parser(
        "gpu-kernels",
        help="time of the expert kernels on an NVIDIA GPU; --tune finds faster tile sizes",
        description="Time each kernel of the experts with the tile sizes it would use, or find faster ones.",
    )
    add_arguments_of_generation(generation)
    add_arguments_of_moe_block(block)
    add_arguments_of_gpu_kernels(kernels)
    for benchmark in (generation, block, kernels):
        # As after other commands; a default of its own would undo a --debug in front of the benchmark's name.
        benchmark.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def add_arguments_of_generation(generation: argparse.ArgumentParser) -> None:
    """Declare those of `bench generate`."""
    shared.add_model(generation)
    generation.add_argument(
        "--batch", type=shared.positive_int, default=1, metavar="N", help="number of prompts (default: 1)"
    )
    generation.add_argument(
        "--prompt-tokens", type=shared.positive_int, default=128, metavar="N", help="tokens per prompt (default: 128)"
    )
    generation.add_argument(
        "--new-tokens",
        type=shared.positive_int,
        default=64,
        metavar="N",
        help="tokens to generate for each prompt (default: 64)",
    )
    generation.add_argument(
        "--rounds", type=shared.positive_int, default=5, metavar="N", help="measured rounds (default: 5)"
    )
    shared.add_dtype(generation)
    shared.add_json(generation)
    generation.set_defaults(run_benchmark=run_generation)


def add_arguments_of_moe_block(block: argparse.ArgumentParser) -> None:
    """Declare those of `bench moe-block`."""
    for option, default, meaning in (
        ("--hidden-size", 1024, "width of a token"),
        ("--intermediate-size", 384, "width of an expert"),
        ("--experts", 64, "number of experts"),
        ("--top-k", 8, "experts per token"),
        ("--rounds", 10, "measured rounds"),
    ):
        block.add_argument(
            option, type=shared.positive_int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    block.add_argument(
        "--tokens",
        action="append",
        type=shared.positive_int,
        metavar="N",
        help=f"number of tokens; may be given several times (default: {', '.join(map(str, DEFAULT_TOKENS))})",
    )
    block.add_argument("--dtype", choices=shared.DTYPES, default="float32", help="dtype (default: float32)")
    shared.add_json(block)
    block.set_defaults(run_benchmark=run_moe_block)


def add_arguments_of_gpu_kernels(kernels: argparse.ArgumentParser) -> None:
    """Declare those of `bench gpu-kernels`."""
    kernels.add_argument(
        "--shape",
        action="append",
        metavar="NAME",
        help=f"shape of a published model's experts, one of {', '.join(SHAPES)} (epN: the share of one of N ranks); may be given "
        "several times (default: all)",
    )
    kernels.add_argument(
        "--tokens",
        action="append",
        type=shared.positive_int,
        metavar="N",
        help=f"number of tokens; may be given several times (default: {', '.join(map(str, DEFAULT_KERNEL_TOKENS))})",
    )
    kernels.add_argument("--backward", action="store_true", help="also the kernels of the gradients")
    kernels.add_argument(
        "--tune", action="store_true", help="try other tile sizes and keep those that are clearly faster"
    )
    kernels.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="with --tune: the file of tuned tile sizes to extend (default: the user's, in the cache folder)",
    )
    kernels.add_argument(
        "--most-candidates",
        type=shared.positive_int,
        metavar="N",
        help="with --tune: try at most N tile sizes per kernel (default: all)",
    )
    shared.add_json(kernels)
    kernels.set_defaults(run_benchmark=run_gpu_kernels)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen benchmark; returns the exit status."""
    return arguments.run_benchmark(arguments)


def run_generation(arguments: argparse.Namespace) -> int:
    """`bench generate`."""
    from moe_jax.benchmarking.generation_speed import measure_generation
    from moe_jax.cli.output import print_json
    from moe_jax.pretrained import from_pretrained

    model = from_pretrained(arguments.model, dtype=shared.dtype_named(arguments.dtype))
    speed = measure_generation(
        model,
        batch_size=arguments.batch,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
    )
    medians = {
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
    }
    if arguments.json:
        print_json(
            {
                "model": arguments.model,
                "dtype": model.dtype.name,
                **machine(),
                **dataclasses.asdict(speed),
                **medians,
            }
        )
    else:
        show_generation(arguments, model.dtype.name, speed)
    return exit_codes.SUCCESS


def show_generation(arguments: argparse.Namespace, dtype: str, speed: "GenerationSpeed") -> None:
    """Print what `bench generate` has measured."""
    from moe_jax.cli.output import format_seconds, print_facts, print_table

    print_facts(
        f"{arguments.model}, {dtype}, on {machine()['device']}",
        [
            (
                "prompts",
                f"{arguments.batch} of {arguments.prompt_tokens:,} tokens, {arguments.new_tokens:,} new ones each",
            ),
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


def run_moe_block(arguments: argparse.Namespace) -> int:
    """`bench moe-block`."""
    from moe_jax.benchmarking.moe_block_speed import measure_moe_block
    from moe_jax.cli.output import print_json
    from moe_jax.config import MoEConfig

    dtype = shared.dtype_named(arguments.dtype)
    config = MoEConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        dtype=dtype,
        param_dtype=dtype,
    )
    speeds = [
        measure_moe_block(config, tokens=tokens, rounds=arguments.rounds)
        for tokens in arguments.tokens or DEFAULT_TOKENS
    ]
    sizes = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_experts", "top_k")}
    if arguments.json:
        cells = [
            {
                **dataclasses.asdict(speed),
                "median_seconds": speed.median_seconds,
                "gflops_per_second": speed.gflops_per_second,
            }
            for speed in speeds
        ]
        print_json({**sizes, "dtype": arguments.dtype, **machine(), "cells": cells})
    else:
        show_moe_block(arguments, speeds)
    return exit_codes.SUCCESS


def show_moe_block(arguments: argparse.Namespace, speeds: "list[MoEBlockSpeed]") -> None:
    """Print what `bench moe-block` has measured."""
    from moe_jax.cli.output import print_table

    print_table(
        f"MoE layer of {arguments.experts} experts, top {arguments.top_k}, {arguments.hidden_size} x "
        f"{arguments.intermediate_size}, {arguments.dtype}, on {machine()['device']}",
        ["tokens", "median ms", "fastest ms", "slowest ms", "GFLOP/s"],
        [
            (
                speed.tokens,
                1e3 * speed.median_seconds,
                1e3 * min(speed.seconds),
                1e3 * max(speed.seconds),
                speed.gflops_per_second,
            )
            for speed in speeds
        ],
    )


def run_gpu_kernels(arguments: argparse.Namespace) -> int:
    """`bench gpu-kernels`."""
    import jax

    from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
    from moe_jax.kernels.device import gpu_device_of
    from moe_jax.kernels.mosaic_gpu.limits import unsupported_device

    if arguments.into is not None and not arguments.tune:
        raise ValueError("--into says where tuned tiles go: it needs --tune")
    if arguments.most_candidates is not None and not arguments.tune:
        raise ValueError("--most-candidates says how many tile sizes are tried: it needs --tune")
    names = arguments.shape or list(EXPERT_SHAPES)
    if unknown := set(names) - set(EXPERT_SHAPES):
        raise ValueError(f"unknown --shape {', '.join(sorted(unknown))}; legal are {', '.join(EXPERT_SHAPES)}")
    device = gpu_device_of()
    reason = unsupported_device(device, jax.default_backend())
    if device is None or reason is not None:
        raise ValueError(f"bench gpu-kernels cannot run: {reason}")
    from moe_jax.cli.gpu_kernels import time_and_show, tune_and_show

    shapes = [EXPERT_SHAPES[name] for name in names]
    tokens = arguments.tokens or DEFAULT_KERNEL_TOKENS
    return (tune_and_show if arguments.tune else time_and_show)(arguments, shapes, tokens, device)


def machine() -> dict[str, str]:
    """What was measured on."""
    import jax

    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
