"""Safetensors to Orbax and back.

Names are loaded when first used, because Orbax takes a second to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, InMemoryCheckpoint, describe
    from .conversion import ConversionReport, convert, write_converted
    from .errors import CheckpointError
    from .exporting import ExportReport, export
    from .hub import resolve_config, resolve_source
    from .mapping import fused_moe_make_expert_params_mapping, make_expert_params_mapping
    from .opening import open_checkpoint
    from .progress import Progress
    from .summary import Summary, inspect
    from .verification import VerificationReport, verify

_MODULES = {
    "Checkpoint": "checkpoint",
    "InMemoryCheckpoint": "checkpoint",
    "describe": "checkpoint",
    "ConversionReport": "conversion",
    "convert": "conversion",
    "write_converted": "conversion",
    "CheckpointError": "errors",
    "ExportReport": "exporting",
    "export": "exporting",
    "resolve_config": "hub",
    "resolve_source": "hub",
    "fused_moe_make_expert_params_mapping": "mapping",
    "make_expert_params_mapping": "mapping",
    "open_checkpoint": "opening",
    "Progress": "progress",
    "Summary": "summary",
    "inspect": "summary",
    "VerificationReport": "verification",
    "verify": "verification",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionReport",
    "ExportReport",
    "InMemoryCheckpoint",
    "Progress",
    "Summary",
    "VerificationReport",
    "convert",
    "describe",
    "export",
    "fused_moe_make_expert_params_mapping",
    "inspect",
    "make_expert_params_mapping",
    "open_checkpoint",
    "resolve_config",
    "resolve_source",
    "verify",
    "write_converted",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
