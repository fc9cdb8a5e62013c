"""Makes the helpers beside the tests importable, keeps the many small files off the disk, and sees what is removed."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

IN_MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A fresh folder, in memory where the machine can: a conversion forces each of its files to the disk."""
    if not os.access(IN_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=IN_MEMORY, prefix="moe_jax_tests_") as name:
        yield Path(name)


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is removed, in this order, by whoever goes through a folder, which lists files before folders."""
    removed: list[Path] = []
    list_folder, remove_folder, remove_file = Path.iterdir, shutil.rmtree, Path.unlink

    def iterdir(folder: Path) -> Iterator[Path]:
        return iter(sorted(list_folder(folder), key=lambda entry: (entry.is_dir(), entry.name)))

    def rmtree(folder: Path, *arguments: Any, **kwargs: Any) -> None:
        removed.append(folder)
        remove_folder(folder, *arguments, **kwargs)

    def unlink(file: Path, *arguments: Any) -> None:
        removed.append(file)
        remove_file(file, *arguments)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "unlink", unlink)
    return removed
