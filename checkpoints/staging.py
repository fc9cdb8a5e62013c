"""Folders that appear whole or not at all: work goes on in a sibling, one rename commits it.

OUT.incomplete   where the work goes on; survives an interruption; a plan in it says whose it is
OUT              appears by a rename
OUT.replaced     holds the folder that is being overwritten, from just before that rename until just after, and a mark
                 that says so: whatever else has this name is somebody's and stays
"""

import contextlib
import fcntl
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .checkpoint_json import read_checkpoint_json
from .errors import CheckpointError
from .file_names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, PARTS_FOLDER, SIDE_FILES
from .parts import PART_NAME

INCOMPLETE_SUFFIX = ".incomplete"
REPLACED_SUFFIX = ".replaced"
_REPLACED_MARK = "replaced.by.moe_jax"
_TMP = ".tmp"

_FILES_OF_A_MODEL = (
    CONFIG_NAME,
    MANIFEST_NAME,
    INDEX_NAME,
    *SIDE_FILES,
    "*.safetensors",
    "README.md",
    "LICENSE*",
    ".gitattributes",
)
"""What overwriting may remove: what is written here, and what else a repository on the hub usually has."""


def incomplete_folder(output: Path) -> Path:
    """Where work on `output` goes on."""
    return output.with_name(output.name + INCOMPLETE_SUFFIX)


def output_folder(output: str | os.PathLike[str]) -> Path:
    """`output` as an absolute path; CheckpointError for an empty name, which would mean the current folder."""
    if not os.fspath(output):
        raise CheckpointError("the folder to create has an empty name")
    return Path(output).absolute()


def check_output(output: Path, overwrite: bool, source: str | os.PathLike[str] | None) -> None:
    """Raise CheckpointError unless a model may be written to `output`.

    Args:
        output: The folder to create; absolute.
        overwrite: Whether it may exist, as a model and nothing else.
        source: The folder that is read, if it is one: `output` may be neither this nor a folder around it.
    """
    if output.name in ("", ".."):
        raise CheckpointError(f"{output}: is not a folder that can be created")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output}: the folder {output.parent} does not exist")
    if not os.path.lexists(output):
        return
    if source is not None and os.path.exists(source):
        _check_apart(Path(source).resolve(), output)
    if not overwrite:
        raise CheckpointError(f"{output}: exists; overwrite it with --overwrite (overwrite=True)")
    if output.is_symlink() or not output.is_dir():
        raise CheckpointError(f"{output}: is not a folder and will not be overwritten")
    if any(output.iterdir()):
        _check_is_model(output)
    _check_replaced(output)


def _check_apart(source: Path, output: Path) -> None:
    """Raise CheckpointError if removing `output` would remove `source`, too; links are followed."""
    if not output.exists():  # a link to nowhere
        return
    if source.samefile(output):
        raise CheckpointError(f"{output}: source and output are the same folder")
    if any(parent.samefile(output) for parent in source.parents):
        raise CheckpointError(f"{output}: the source {source} lies in this folder, which will not be overwritten")


def _check_is_model(folder: Path) -> None:
    """Raise CheckpointError, naming what is in the way, unless `folder` holds a model and nothing else."""
    try:
        model_type = read_checkpoint_json(folder / CONFIG_NAME).get("model_type")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: is not a model and will not be overwritten: {error}") from error
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{folder}: is not a model and will not be overwritten: its {CONFIG_NAME} has no model_type"
        )
    strangers = []
    for entry in folder.iterdir():
        if entry.name == PARTS_FOLDER and entry.is_dir():
            strangers += [part for part in entry.iterdir() if not (part.is_dir() and PART_NAME.fullmatch(part.name))]
        elif not (entry.is_file() and any(fnmatch.fnmatchcase(entry.name, name) for name in _FILES_OF_A_MODEL)):
            strangers.append(entry)
    if strangers:
        raise CheckpointError(
            f"{folder}: will not be overwritten, because {min(strangers)} does not belong to a model; move it elsewhere"
        )


def check_unfinished_work(work: Path, plan_name: str, has_plan: bool, may_discard: bool) -> None:
    """Raise CheckpointError unless what `work`, if it exists, holds may be discarded.

    Args:
        work: `OUT.incomplete`.
        plan_name: Name of the file that says whose work it is: "conversion.json", "export.json".
        has_plan: Whether that, or what it became, is there. Without it only an empty folder may be discarded.
        may_discard: Whether with it anything may.
    """
    what = Path(plan_name).stem
    if not has_plan:
        found = {entry.name for entry in work.iterdir()} if work.exists() else set()
        if strangers := sorted(found - {plan_name + _TMP}):
            raise CheckpointError(f"{work}: is in the way and is not an interrupted {what}: {strangers}")
    elif not may_discard:
        raise CheckpointError(
            f"{work}: holds an interrupted {what} of another source, or with other options; "
            "delete it, or discard it with --overwrite (overwrite=True)"
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError when the disk of `folder` plainly has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder}: no space left: {needed:,} bytes are needed, {free:,} are free")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` (created if absent); CheckpointError when another process holds it, or it is no folder."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise CheckpointError(f"{folder}: is in the way, because unfinished work is kept in a folder of this name")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder}: another process is writing to it") from error
        if not _is_at(descriptor, folder):  # who held it has renamed it, and what has the name now is free for others
            raise CheckpointError(f"{folder}: another process was writing to it, and has just finished")
        yield
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open folder is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force everything in `folder` to the disk, names included."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def write_file(path: Path, content: str) -> None:
    """Write a file that is whole whenever it exists."""
    unfinished = path.with_name(path.name + _TMP)
    unfinished.write_text(content, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def commit(finished: Path, output: Path) -> None:
    """Turn `finished`, which is `OUT.incomplete` or a folder in it, into `OUT`, in place of what may be there."""
    replaced = _replaced_folder(output)
    if output.exists():
        _check_replaced(output)
        replaced.mkdir(exist_ok=True)
        clear(replaced, last=replaced / _REPLACED_MARK)
        (replaced / _REPLACED_MARK).touch()
        os.rename(output, replaced / output.name)
    os.rename(finished, output)
    sync(output.parent)
    if (replaced / _REPLACED_MARK).exists():
        remove(replaced, last=replaced / _REPLACED_MARK)


def _replaced_folder(output: Path) -> Path:
    return output.with_name(output.name + REPLACED_SUFFIX)


def _check_replaced(output: Path) -> None:
    """Raise CheckpointError when `OUT.replaced` is neither free nor what a killed process has left."""
    replaced = _replaced_folder(output)
    if not os.path.lexists(replaced):
        return
    is_folder = replaced.is_dir() and not replaced.is_symlink()
    if not is_folder or (any(replaced.iterdir()) and not (replaced / _REPLACED_MARK).exists()):
        raise CheckpointError(
            f"{replaced}: is in the way, because {output} is kept there while it is overwritten; move it elsewhere"
        )


def clear(folder: Path, last: Path | None = None) -> None:
    """Remove everything in `folder`, not the folder itself; `last`, which says what it was, after everything else."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry == last):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def remove(folder: Path, last: Path) -> None:
    """Remove a folder that an output has no more use for: the output is there, whatever becomes of this."""
    with contextlib.suppress(OSError):
        clear(folder, last)
        folder.rmdir()


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's errors while writing into a CheckpointError that names `folder`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written: {error}") from error
