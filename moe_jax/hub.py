"""Where a model's files are: a folder on this machine, or one that the Hugging Face hub gives us a copy of."""

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder `source`, or the downloaded files of the hub repository `source` ("owner/name").

    Weights come as safetensors only: pickles are never fetched.

    Raises:
        FileNotFoundError: `source` is neither an existing folder nor shaped like a hub id.
        huggingface_hub.errors.HfHubHTTPError: the hub doesn't have it, or refuses it.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and needed by few

    return Path(snapshot_download(str(source), allow_patterns=list(_FILES)))
