"""The JSON files of a checkpoint, whose defects are the checkpoint's."""

from pathlib import Path
from typing import Any

from moe_jax.json_files import read_json_object

from .errors import CheckpointError


def read_checkpoint_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointError naming the file when there is none."""
    try:
        return read_json_object(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
