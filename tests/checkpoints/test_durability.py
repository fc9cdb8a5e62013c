"""Nothing gets the name under which it counts as finished before it is on the disk: a power failure is survived, too.

A killed process loses nothing that it wrote, so the tests of interruptions cannot see whether it was forced to the disk.
"""

import os
import threading
from pathlib import Path

import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import convert, export, verify

WRITERS = {"convert": convert, "export": export}
PLANS = {"convert": "conversion.json", "export": "export.json"}


def content_of(place):
    """Of a folder (path or descriptor) its names and what they lead to, of a file its bytes."""
    status = os.stat(place)
    if not os.path.isdir(place):
        return os.pread(place, status.st_size, 0) if isinstance(place, int) else place.read_bytes()
    with os.scandir(place) as entries:
        return {entry.name: entry.inode() for entry in entries}


class Disk:
    """What a power failure would leave: everything that was forced to the disk, as it was then."""

    def __init__(self, monkeypatch):
        self.kept = {}
        real, one_at_a_time = os.fsync, threading.Lock()

        def fsync(descriptor):
            # Parts are written by several threads: what one of them saw earlier must not be noted later.
            with one_at_a_time:
                content = content_of(descriptor)  # what comes while it is being forced to the disk may be lost
                real(descriptor)
                self.kept[os.fstat(descriptor).st_ino] = content

        monkeypatch.setattr(os, "fsync", fsync)

    def keeps(self, place):
        return self.kept.get(place.stat().st_ino) == content_of(place)

    def lost(self, place):
        """What of a file or folder would be another, or not there."""
        return sorted(str(path) for path in (place, *place.rglob("*")) if not self.keeps(path))

    def keeps_name(self, place):
        """Whether `place` would still have its name."""
        return self.kept.get(place.parent.stat().st_ino, {}).get(place.name) == place.stat().st_ino


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_on_the_disk_before_it_counts_as_finished(tmp_path, rng, monkeypatch, command, overwrite):
    source = tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng))
    output, work = tmp_path / "output", tmp_path / "output.incomplete"
    if overwrite:
        convert(source, output)
    disk, finished = Disk(monkeypatch), []

    def checked(rename):
        def wrapper(old, new, **kwargs):
            old, new = Path(old), Path(new)
            if new == work / PLANS[command]:
                assert disk.keeps(old)
            elif new.parent == work / "parts":
                assert disk.keeps_name(work / PLANS[command])
                assert disk.lost(old) == []
                finished.append(new)
            elif new in (work / "moe_jax.json", work / "model", output):
                assert disk.lost(work if new.name == "moe_jax.json" else old) == []
                finished.append(new)
            rename(old, new, **kwargs)

        return wrapper

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    WRITERS[command](source, output, overwrite=overwrite)
    assert finished[-2:] == [work / ("moe_jax.json" if command == "convert" else "model"), output]
    assert disk.keeps_name(output)
    assert disk.lost(output) == []
    monkeypatch.undo()
    assert verify(source, output).ok
