"""`quantization_config` of a `config.json`: which of the formats that published checkpoints force on everyone it is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFP8:
    """DeepSeek's float8_e4m3fn weights with a multiplier per block (spec 7.2b; hf_families 7.1)."""

    block: tuple[int, int] | None
    """Rows and columns that share a multiplier; None: one multiplier per matrix."""

    method = "fp8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP4:
    """gpt-oss's 4-bit expert weights with a power of two per 32 values (spec 7.8; hf_families 7.2)."""

    method = "mxfp4"


Quantization = BlockFP8 | MXFP4

DEFAULT_BLOCK = [128, 128]
"""What `transformers` takes where `weight_block_size` is absent; null means one multiplier per matrix."""


def read_quantization(config: Mapping[str, Any], where: object) -> Quantization | None:
    """The quantization of the checkpoint that `config` (its `config.json`) belongs to, None if it isn't quantized.

    Raises:
        CheckpointError: Naming `where`: any other method, or a variant of these whose tensors would be read wrongly.
    """
    try:
        return _read_quantization(config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    settings = config.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config must be an object, got {settings!r}")
    method = settings.get("quant_method")
    if method == MXFP4.method:
        return MXFP4()
    if method != BlockFP8.method:
        raise CheckpointError(f"quantization_config: quant_method must be one of fp8, mxfp4; got {method!r}")
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise CheckpointError(
            f"quantization_config: activation_scheme must be 'dynamic', got {settings['activation_scheme']!r}"
        )
    if settings.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"quantization_config: fmt must be 'e4m3', got {settings['fmt']!r}")
    block = settings.get("weight_block_size", DEFAULT_BLOCK)
    if block is None:
        return BlockFP8(block=None)
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(f"quantization_config: weight_block_size must be two positive sizes, got {block!r}")
    return BlockFP8(block=(block[0], block[1]))
