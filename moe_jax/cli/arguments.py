"""Arguments that several commands take."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax.numpy as jnp

DTYPES = ("bfloat16", "float32", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """`MODEL`: what `from_pretrained` takes."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a hub id (owner/name) or a converted folder"
    )


def add_revision(parser: argparse.ArgumentParser) -> None:
    """`--revision`, of a hub id."""
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a model on the hub (default: its main branch)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, computed and held."""
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: the checkpoint's)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def dtype_named(name: str | None) -> "jnp.dtype | None":
    """The dtype of `--dtype`."""
    import jax.numpy as jnp

    return None if name is None else jnp.dtype(name)


def number(text: str) -> float:
    """A number, for `type=`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def whole_number(text: str) -> int:
    """An integer, for `type=`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive_int(text: str) -> int:
    """An integer of at least 1, for `type=`."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
