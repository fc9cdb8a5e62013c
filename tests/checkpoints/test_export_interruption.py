"""Killed at any moment, an export leaves nothing that looks whole, and is done by the next run."""

import itertools
import json
import shutil

import pytest
import tiny_checkpoint as tiny
from interrupted_conversion import run_killed_at_rename, run_killed_before_step

from moe_jax.checkpoints import CheckpointError, InMemoryCheckpoint, convert, export, open_checkpoint, verify

KILLED = -9


@pytest.fixture
def source(tmp_path, rng):
    return tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def names_beside(output):
    """What an export has left beside its output."""
    return sorted(path.name for path in output.parent.glob(f"{output.name}.*"))


def interrupt_before_the_last_rename(source, output, **options):
    """Leave an export that is finished but for the rename to its place."""
    assert run_killed_at_rename(output, False, source, output, options, "export") == KILLED
    assert not output.exists()


@pytest.mark.parametrize("overwrites", [False, True], ids=["plain", "overwriting"])
def test_a_kill_before_any_change_of_the_file_system_is_survived(tmp_path, rng, source, output, overwrites):
    """Also between the two renames of overwriting, when the output is not there."""
    old = tiny.write_folder(tmp_path / "old", tiny.random_tensors(rng))
    overwrites_again = bool(rng.integers(2))  # must make no difference
    for step in itertools.count():
        if overwrites:
            export(old, output)
        if run_killed_before_step(step, source, output, {"overwrite": overwrites}) != KILLED:
            break
        with pytest.raises(CheckpointError, match="does not exist|unfinished work|is not a folder"):
            open_checkpoint(output.with_name("output.incomplete"))
        if output.exists():
            assert verify(source, output).ok or (overwrites and verify(old, output).ok)
        elif overwrites:
            assert verify(old, output.with_name("output.replaced") / "output").ok
        # What exists must be overwritten explicitly, as ever.
        export(source, output, overwrite=overwrites_again or output.exists())
        assert verify(source, output).ok
        assert names_beside(output) == []
        shutil.rmtree(output)
    assert step > 10
    assert verify(source, output).ok
    assert names_beside(output) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_that_only_had_to_be_renamed_is_not_done_again(source, output, overwrite, monkeypatch):
    interrupt_before_the_last_rename(source, output)

    def refuse(*arguments):
        raise AssertionError("is written again")

    monkeypatch.setattr("moe_jax.checkpoints.exporting._write_tensors", refuse)
    events = []
    report = export(source, output, overwrite=overwrite, progress=events.append)
    assert verify(source, output).ok
    assert report.tensors == len(tiny.qwen3_shapes())
    assert [event.done_bytes for event in events] == [report.nbytes]
    assert names_beside(output) == []


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"form": "fused"}, {"max_shard_bytes": 3000}], ids=str)
def test_a_finished_export_with_other_options_is_not_taken_for_this_one(source, output, change):
    interrupt_before_the_last_rename(source, output)
    with pytest.raises(
        CheckpointError, match=r"interrupted export of another source, or with other options(.|\n)*--overwrite"
    ):
        export(source, output, **change)
    report = export(source, output, overwrite=True, **change)
    assert report.form == change.get("form", "per_expert")
    assert len(report.files) > 1 if "max_shard_bytes" in change else len(report.files) == 1
    assert open_checkpoint(output).dtype_of("embedder.embedding").name == change.get("dtype", "float32")
    assert verify(source, output).ok


def test_a_finished_export_of_another_source_is_not_taken_for_this_one(tmp_path, rng, source, output):
    other = tiny.write_folder(tmp_path / "other", tiny.random_tensors(rng))
    interrupt_before_the_last_rename(other, output)
    with pytest.raises(CheckpointError, match="interrupted export of another source"):
        export(source, output)
    export(source, output, overwrite=True)
    assert verify(source, output).ok


def test_a_finished_export_from_memory_is_not_taken_for_one_of_other_values(tmp_path, rng, output, monkeypatch):
    """It has no digest by which its values could be known again."""
    folders = [tiny.write_folder(tmp_path / name, tiny.random_tensors(rng)) for name in ("before", "after")]
    readers = [open_checkpoint(folder) for folder in folders]
    before, after = (
        InMemoryCheckpoint(config=reader.config, leaves={path: reader.read(path) for path in reader.shapes})
        for reader in readers
    )

    def disk_is_full(*arguments):
        raise OSError("disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("moe_jax.checkpoints.exporting.commit", disk_is_full)
        with pytest.raises(CheckpointError, match="disk is full"):
            export(before, output)
    with pytest.raises(CheckpointError, match="interrupted export of another source"):
        export(after, output)
    export(after, output, overwrite=True)
    assert verify(folders[1], output).ok


def test_what_says_whose_it_is_goes_last_when_a_finished_export_or_an_old_output_is_discarded(
    tmp_path, rng, source, output, removed
):
    other = tiny.write_folder(tmp_path / "other", tiny.random_tensors(rng))
    interrupt_before_the_last_rename(other, output)
    export(other, tmp_path / "old")
    shutil.copytree(tmp_path / "old", output)
    replaced = output.with_name("output.replaced")  # as a killed process leaves it
    shutil.copytree(tmp_path / "old", replaced / "output")
    (replaced / "replaced.by.moe_jax").touch()
    removed.clear()
    export(source, output, overwrite=True)
    work = output.with_name("output.incomplete")
    assert [path.name for path in removed if path.parent == work] == ["model", "export.json", "export.json"]
    of_replaced = [path.name for path in removed if path.parent == replaced]
    assert of_replaced == ["output", "replaced.by.moe_jax"] * 2  # what was there, then the old output
    assert verify(source, output).ok


def test_an_unfinished_export_is_discarded_and_done_again(source, output):
    work = output.with_name("output.incomplete")
    place = work / "model"
    assert run_killed_at_rename(place, False, source, output, {"dtype": "bfloat16"}, "export") == KILLED
    with pytest.raises(CheckpointError, match="unfinished work"):
        open_checkpoint(work / "model.incomplete")
    export(source, output)
    assert verify(source, output).ok
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "float32"
    assert names_beside(output) == []


def test_an_interrupted_conversion_in_the_way_is_left_alone(tmp_path, source, output):
    part = output.with_name("output.incomplete") / "parts" / "model.000"
    assert run_killed_at_rename(part, True, source, output, {}) == KILLED
    with pytest.raises(CheckpointError, match="is in the way and is not an interrupted export"):
        export(source, output, overwrite=True)
    assert part.exists()
    assert convert(source, output).parts_resumed > 0
