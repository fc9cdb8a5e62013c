"""The files of an array in a part (zarr format 2): a description, and chunks of uncompressed numbers."""

import math
import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint_json import read_checkpoint_json
from .errors import CheckpointError
from .layout import Shape

DESCRIPTION_NAME = ".zarray"

_PLAIN_CHUNKS = {"compressor": None, "filters": None, "order": "C", "dimension_separator": ".", "zarr_format": 2}
"""What makes a chunk a file of nothing but the numbers."""


def is_plain(description: Mapping[str, Any]) -> bool:
    """Whether every chunk of the array with this description is a file of nothing but its numbers."""
    return all(description.get(key) == value for key, value in _PLAIN_CHUNKS.items())


def array_problems(folder: Path, shape: Shape, dtype: np.dtype) -> list[str]:
    """What is wrong with the files of the array in `folder`, one line per file, by their names and sizes."""
    file = folder / DESCRIPTION_NAME
    try:
        description = read_checkpoint_json(file)
    except CheckpointError as error:
        return list(error.problems)
    expected = {"shape": list(shape), "dtype": dtype.newbyteorder("<").str if dtype.kind == "f" else dtype.name}
    is_expected = all(description.get(key) == value for key, value in expected.items())
    chunk: Any = description.get("chunks")
    if not is_expected or not is_plain(description) or not _is_shape(chunk, len(shape)):
        return [f"{file}: does not describe {dtype.name} {list(shape)} in uncompressed chunks"]
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    nbytes = math.prod(chunk) * dtype.itemsize
    grid = product(*(range(-(-length // step)) for length, step in zip(shape, chunk, strict=True)))
    problems = []
    for position in grid:
        name = ".".join(map(str, position))
        if name not in sizes:
            problems.append(f"{folder / name}: missing")
        elif sizes[name] != nbytes:
            problems.append(f"{folder / name}: must have {nbytes} bytes, has {sizes[name]}")
    return problems


def _is_shape(value: object, rank: int) -> bool:
    return isinstance(value, list) and len(value) == rank and all(isinstance(n, int) and n > 0 for n in value)
