"""Folders that appear whole or not at all: work goes on in a sibling, one rename commits it.

OUT.incomplete   where the work goes on; survives an interruption
OUT              appears by a rename
OUT.replaced     holds the folder that is being overwritten, from just before that rename until just after, and a mark
                 that says so: whatever else has this name is somebody's and stays
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import CheckpointError

INCOMPLETE_SUFFIX = ".incomplete"
REPLACED_SUFFIX = ".replaced"
_REPLACED_MARK = "replaced.by.moe_jax"
_MODEL_FILES = ("moe_jax.json", "config.json")


def incomplete_folder(output: Path) -> Path:
    """Where work on `output` goes on."""
    return output.with_name(output.name + INCOMPLETE_SUFFIX)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a model may be written to `output`."""
    if not output.name:
        raise CheckpointError(f"{output}: is not a folder that can be created")
    if not output.parent.is_dir():
        raise CheckpointError(f"{output}: the folder {output.parent} does not exist")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise CheckpointError(f"{output}: exists; overwrite it with --overwrite (overwrite=True)")
    if output.is_symlink() or not output.is_dir():
        raise CheckpointError(f"{output}: is not a folder and will not be overwritten")
    if any(output.iterdir()) and not any((output / name).exists() for name in _MODEL_FILES):
        raise CheckpointError(
            f"{output}: has neither {' nor '.join(_MODEL_FILES)}, so it is not a model and will not be overwritten"
        )
    _check_replaced(output)


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError when the disk of `folder` plainly has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder}: no space left: {needed:,} bytes are needed, {free:,} are free")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` (created if absent); CheckpointError when another process holds it."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder}: another process is writing to it") from error
        yield
    finally:
        os.close(descriptor)


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
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(content, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def commit(output: Path) -> None:
    """Turn the finished `OUT.incomplete` into `OUT`, in place of what may be there."""
    replaced = _replaced_folder(output)
    if output.exists():
        _check_replaced(output)
        replaced.mkdir(exist_ok=True)
        (replaced / _REPLACED_MARK).touch()
        clear(replaced, last=replaced / _REPLACED_MARK)
        (replaced / _REPLACED_MARK).touch()
        os.rename(output, replaced / output.name)
    os.rename(incomplete_folder(output), output)
    sync(output.parent)
    if (replaced / _REPLACED_MARK).exists():
        with contextlib.suppress(OSError):  # the output is there, whatever becomes of the old one
            clear(replaced, last=replaced / _REPLACED_MARK)
            replaced.rmdir()


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


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's errors while writing into a CheckpointError that names `folder`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written: {error}") from error
