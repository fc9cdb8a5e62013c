"""Where a model's files are: a folder here, or a repository on the Hugging Face hub."""

import os
import re
from pathlib import Path

from .errors import CheckpointError
from .side_files import SIDE_FILES

CONFIG = "config.json"
DOWNLOADED = ("*.safetensors", "model.safetensors.index.json", CONFIG, *SIDE_FILES)
"""What is downloaded: never a pickle, never code."""
NOT_DOWNLOADED = ("*/*", "consolidated*")
"""The same weights in the layout of whoever trained them, which some repositories hold as well."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_source(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model: `source` itself if it is one, else the local copy of that repository on the hub.

    Args:
        source: A folder, or an id such as "Qwen/Qwen3-30B-A3B".
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: It is neither a folder nor an id, or the repository cannot be downloaded.
    """
    return _resolve(source, revision, DOWNLOADED)


def resolve_config(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The `config.json` of a model: `source` itself if it is a file, else that of `resolve_source`, alone downloaded.

    Args:
        source: A `config.json`, a folder, or an id such as "Qwen/Qwen3-30B-A3B".
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: It is nothing of these, or the repository cannot be downloaded.
    """
    found = _resolve(source, revision, (CONFIG,))
    return found / CONFIG if found.is_dir() else found


def _resolve(source: str | os.PathLike[str], revision: str | None, downloaded: tuple[str, ...]) -> Path:
    folder = Path(source)
    if folder.exists():
        return folder
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=list(downloaded), ignore_patterns=list(NOT_DOWNLOADED)
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: is not a folder, and cannot be downloaded from the hub: {error}") from error
