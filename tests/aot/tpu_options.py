"""The command-line options that scripts for TPU kernels share."""

import argparse
from collections.abc import Collection
from pathlib import Path

from tpu_programs import PROGRAMS, TOKENS

from moe_jax.aot.targets import TPU_TOPOLOGIES
from moe_jax.benchmarking.expert_shapes import TPU_SHAPES


def add_selection_options(
    parser: argparse.ArgumentParser,
    *,
    legal_models: Collection[str] = TPU_SHAPES,
    tokens: Collection[int] = TOKENS,
    programs: bool = True,
) -> None:
    """What to compile: generations, models, numbers of tokens, and programs unless there is one only."""

    def add(name: str, meaning: str, legal: Collection[str], default: Collection[str]) -> None:
        legal, default = list(legal), list(default)
        shown = "all" if legal == default else " ".join(default)
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=default,
            choices=legal,
            metavar=name.removesuffix("s").upper(),
            help=f"{meaning}: {' '.join(legal)} (default: {shown})",
        )

    add("tpus", "generations", TPU_TOPOLOGIES, TPU_TOPOLOGIES)
    add("models", "models", legal_models, TPU_SHAPES)
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=list(tokens),
        metavar="N",
        help=f"numbers of tokens (default: {' '.join(map(str, tokens))})",
    )
    if programs:
        add("programs", "programs", PROGRAMS, PROGRAMS)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a script whose work can be cut short, taken up later, and shared by several processes."""
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e6,
        metavar="X",
        help="start nothing more after this many minutes (default: no limit)",
    )
    parser.add_argument("--verbose", action="store_true", help="print each row as soon as it is known")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="processes that compile side by side (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/aot"),
        metavar="FOLDER",
        help="where to write the results, and keep what is done already (default: %(default)s)",
    )
