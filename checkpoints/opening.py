"""Opens whatever kind of checkpoint a folder holds."""

import os
from pathlib import Path

from .checkpoint import Checkpoint
from .converted import ConvertedCheckpoint
from .errors import CheckpointError
from .file_names import CONFIG_NAME, MANIFEST_NAME
from .huggingface import HuggingFaceCheckpoint
from .staging import INCOMPLETE_SUFFIX


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A reader of the Hugging Face folder or converted folder `path`; parameters are read when asked for.

    Raises:
        CheckpointError: The folder doesn't exist, is neither, or isn't whole; every problem found is listed. Or it has two
            different tables that its `config.json` says are one.
    """
    reader = open_headers(path)
    if isinstance(reader, HuggingFaceCheckpoint):
        reader.check_tied_embeddings()
    return reader


def open_headers(path: str | os.PathLike[str]) -> ConvertedCheckpoint | HuggingFaceCheckpoint:
    """As `open_checkpoint`, but no value is read, and so none is compared."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder" if folder.exists() else f"{folder}: does not exist")
    if folder.name.endswith(INCOMPLETE_SUFFIX):
        raise CheckpointError(f"{folder}: is unfinished work; run the same command again to finish it")
    if (folder / MANIFEST_NAME).exists():
        return ConvertedCheckpoint(folder)
    if not (folder / CONFIG_NAME).exists():
        raise CheckpointError(f"{folder}: has neither {MANIFEST_NAME} nor {CONFIG_NAME}")
    return HuggingFaceCheckpoint(folder)
