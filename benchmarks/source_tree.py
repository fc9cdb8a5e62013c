"""Lets a script of this folder import moe_jax from the source tree, on a machine where it cannot be installed. Not a script."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_source_tree() -> None:
    """Make `moe_jax`, with `moe_jax.kernels` and `moe_jax.checkpoints`, importable; an installed one is left alone.

    An installation maps the folders `kernels/` and `checkpoints/` into the package (`setup.py`). Without one, the package
    searches its submodules in the root of the tree as well.
    """
    if importlib.util.find_spec("moe_jax") is None:
        sys.path.insert(0, str(ROOT))
    import moe_jax

    if importlib.util.find_spec("moe_jax.kernels") is None:
        moe_jax.__path__.append(str(ROOT))
