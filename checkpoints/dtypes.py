"""Dtypes of the safetensors format and their numpy counterparts."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .errors import CheckpointError

SAFETENSORS_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}

SAFETENSORS_NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

WEIGHT_DTYPES = tuple(np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32))
"""Dtypes that an unquantized parameter may have."""

MAIN_PARAMETER = "embedder.embedding"
"""The parameter whose dtype `config.json` names, and in which a model computes unless it is told another."""
ASSUMED_DTYPE = "bfloat16"
"""What a `config.json` means that names no dtype."""

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Today's spelling and the older one; a file may have both."""


def weight_dtype(dtype: object) -> np.dtype:
    """`dtype` (a name, numpy or JAX dtype) as numpy's; CheckpointError unless parameters may have it."""
    try:
        result = np.dtype(dtype)  # type: ignore[arg-type]
    except TypeError:  # no dtype at all, such as "bf16"
        got = dtype
    else:
        if result in WEIGHT_DTYPES:
            return result
        got = result.name
    raise CheckpointError(f"dtype must be one of {', '.join(d.name for d in WEIGHT_DTYPES)}; got {got!r}")


def named_dtype(config: Mapping[str, Any], where: object) -> np.dtype:
    """The dtype that a `config.json` names; CheckpointError naming `where` and the key unless parameters may have it."""
    legal = [dtype.name for dtype in WEIGHT_DTYPES]
    for key in _DTYPE_KEYS:
        if config.get(key) is not None:
            if config[key] not in legal:
                raise CheckpointError(f"{where}: {key} must be one of {', '.join(legal)}; got {config[key]!r}")
            return np.dtype(config[key])
    return np.dtype(ASSUMED_DTYPE)


def naming_dtype(config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """`config` saying `dtype` under every spelling that it has; without any, only what would not be assumed is added."""
    spellings = [key for key in _DTYPE_KEYS if config.get(key) is not None]
    if not spellings and dtype.name != ASSUMED_DTYPE:
        spellings = [_DTYPE_KEYS[0]]
    return {**config, **dict.fromkeys(spellings, dtype.name)}
