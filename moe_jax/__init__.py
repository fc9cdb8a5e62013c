"""Mixture-of-Experts layers for JAX that follow vLLM's semantics.

Public names are imported when they are first used, so that importing a layer doesn't import a checkpoint library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.config import (
        GroupLimit,
        MoEConfig,
        ParallelConfig,
        RouterConfig,
        SharedExpertsConfig,
    )
    from moe_jax.experts import RoutedExperts, SharedExperts
    from moe_jax.placement import ExpertMapManager
    from moe_jax.pretrained import from_pretrained, save_pretrained
    from moe_jax.runner import MoEAux, MoERunner, MoERunnerInterface, is_moe_layer

_HOME_OF_NAME = {
    "ExpertMapManager": "moe_jax.placement",
    "GroupLimit": "moe_jax.config",
    "MoEAux": "moe_jax.runner",
    "MoEConfig": "moe_jax.config",
    "MoERunner": "moe_jax.runner",
    "MoERunnerInterface": "moe_jax.runner",
    "ParallelConfig": "moe_jax.config",
    "RoutedExperts": "moe_jax.experts",
    "RouterConfig": "moe_jax.config",
    "SharedExperts": "moe_jax.experts",
    "SharedExpertsConfig": "moe_jax.config",
    "from_pretrained": "moe_jax.pretrained",
    "is_moe_layer": "moe_jax.runner",
    "save_pretrained": "moe_jax.pretrained",
}

__all__ = [
    "ExpertMapManager",
    "GroupLimit",
    "MoEAux",
    "MoEConfig",
    "MoERunner",
    "MoERunnerInterface",
    "ParallelConfig",
    "RoutedExperts",
    "RouterConfig",
    "SharedExperts",
    "SharedExpertsConfig",
    "from_pretrained",
    "is_moe_layer",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name, the first time it is asked for (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("moe-jax")
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
