"""The command line, `moe-jax`."""

import sys

from moe_jax.cli import exit_codes

try:
    from moe_jax.cli.main import main
except KeyboardInterrupt:  # importing takes long enough for it
    print("\nmoe-jax: interrupted", file=sys.stderr)
    sys.exit(exit_codes.INTERRUPTED)

__all__ = ["main"]
