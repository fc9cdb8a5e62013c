"""Where a model's files are: a folder here, or a repository on the Hugging Face hub.

Of a repository `config.json` comes first: a model that cannot be read is refused before its weights are downloaded.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from .checkpoint import describe
from .checkpoint_json import read_checkpoint_json
from .errors import CheckpointError
from .file_names import CONFIG_NAME, INDEX_NAME, SIDE_FILES
from .quantization_config import read_quantization
from .safetensors_file import TensorEntry, parse_header
from .safetensors_folder import has_weights

DOWNLOADED = ("*.safetensors", INDEX_NAME, CONFIG_NAME, *SIDE_FILES)
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
        CheckpointError: It is neither a folder nor an id, the repository cannot be downloaded, its `config.json` isn't
            supported, or a revision of a folder is asked for.
    """
    if _is_here(source, revision):
        return Path(source)
    _check_supported(_download(source, revision, (CONFIG_NAME,)) / CONFIG_NAME)
    return _download(source, revision, DOWNLOADED)


def resolve_config(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The `config.json` of a model: `source` itself if it is a file, else that of `resolve_source`, alone downloaded.

    Args:
        source: A `config.json`, a folder, or an id such as "Qwen/Qwen3-30B-A3B".
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: It is nothing of these, the repository cannot be downloaded, or a revision of a file or folder is
            asked for.
    """
    found = Path(source) if _is_here(source, revision) else _download(source, revision, (CONFIG_NAME,))
    return found / CONFIG_NAME if found.is_dir() else found


def resolve_headers(
    source: str | os.PathLike[str], revision: str | None = None
) -> tuple[Path, Mapping[str, TensorEntry] | None]:
    """As `resolve_source`, but of a repository whose weights are not here only `config.json` and headers are downloaded.

    Returns:
        The folder of `config.json`, and the tensors by name where their files are not in that folder.

    Raises:
        CheckpointError: As `resolve_source`, or a header is damaged.
    """
    if _is_here(source, revision):
        return Path(source), None
    folder = _download(source, revision, (CONFIG_NAME, INDEX_NAME))
    _check_supported(folder / CONFIG_NAME)
    return folder, None if has_weights(folder) else _headers(str(source), revision)


def _is_here(source: str | os.PathLike[str], revision: str | None) -> bool:
    """Whether `source` is a file or folder; if not, it is an id."""
    if not os.fspath(source):
        raise CheckpointError("the model to read has an empty name")
    if os.path.exists(source):
        if revision is not None:
            raise CheckpointError(f"{source}: is not on the hub, so it has no revision {revision!r}")
        return True
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: does not exist, and is no hub id, which has the form owner/name")
    return False


def _check_supported(config_file: Path) -> None:
    config = read_checkpoint_json(config_file)
    describe(config, config_file)
    read_quantization(config, config_file)


def _download(source: str | os.PathLike[str], revision: str | None, names: tuple[str, ...]) -> Path:
    """The local copy of a repository, in which at least the files with these names are."""
    from huggingface_hub import snapshot_download

    with _download_errors(source):
        return Path(
            snapshot_download(
                str(source), revision=revision, allow_patterns=list(names), ignore_patterns=list(NOT_DOWNLOADED)
            )
        )


def _headers(repository: str, revision: str | None) -> dict[str, TensorEntry]:
    """The tensors of a repository by name, as the headers of its files describe them."""
    from huggingface_hub import get_safetensors_metadata

    with _download_errors(repository):
        files = get_safetensors_metadata(repository, revision=revision).files_metadata
    tensors: dict[str, TensorEntry] = {}
    for name, metadata in sorted(files.items()):
        header = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            for tensor, info in metadata.tensors.items()
        }
        for entry in parse_header(Path(repository, name), header):
            tensors[entry.name] = entry
    return tensors


@contextmanager
def _download_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong with the hub into a CheckpointError that names `source`."""
    from huggingface_hub import errors

    # What the HTTP library raises, whichever it is, and OSError.
    of_the_network = cast(tuple[type[Exception], ...], errors.HfHubHTTPError.__bases__)
    try:
        yield
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError, *of_the_network) as error:
        raise CheckpointError(f"{source}: is not a folder, and cannot be downloaded from the hub: {error}") from error
