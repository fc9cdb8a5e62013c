"""The command line, `moe-jax`."""

from moe_jax.cli.main import main

__all__ = ["main"]
