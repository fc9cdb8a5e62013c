"""Killed at any moment, a conversion leaves nothing that looks whole, and goes on to the same result."""

import collections
import re
import shutil
import time

import numpy as np
import pytest
import tiny_checkpoint as tiny
from interrupted_conversion import run_killed_after, run_killed_at_rename

from moe_jax.checkpoints import (
    CheckpointError,
    InMemoryCheckpoint,
    convert,
    open_checkpoint,
    verify,
    write_converted,
)

OPTIONS = {"part_bytes": 1500}
KILLED = -9


@pytest.fixture
def source(tmp_path, rng):
    return tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng), shards=2)


@pytest.fixture
def undisturbed(tmp_path, source):
    convert(source, tmp_path / "undisturbed", **OPTIONS)
    return tmp_path / "undisturbed"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def work_of(output):
    return output.with_name("output.incomplete")


def tree_of(folder):
    """Relative path of every folder and file."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_same_conversion(output, undisturbed):
    """The same tree, the same manifest, the same bytes of every parameter, and nothing left beside it."""
    assert tree_of(output) == tree_of(undisturbed)
    assert (output / "moe_jax.json").read_text() == (undisturbed / "moe_jax.json").read_text()
    actual, expected = open_checkpoint(output), open_checkpoint(undisturbed)
    for path in expected.shapes:
        assert actual.read(path).tobytes() == expected.read(path).tobytes(), path
    assert not work_of(output).exists()
    assert not output.with_name("output.replaced").exists()


DESTINATIONS = {
    "the plan": "{work}/conversion.json",
    "the first part": "{work}/parts/model.000",
    "a part of experts": "{work}/parts/layers.00001.experts.00002-00003",
    "the manifest": "{work}/moe_jax.json",
    "the output": "{output}",
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("destination", DESTINATIONS.values(), ids=DESTINATIONS.keys())
def test_a_kill_around_a_commit_is_survived(source, output, undisturbed, destination, after):
    place = type(output)(destination.format(work=work_of(output), output=output))
    assert run_killed_at_rename(place, after, source, output, OPTIONS) == KILLED
    if output.exists():
        assert destination == "{output}"
        assert after
    else:
        with pytest.raises(CheckpointError, match="unfinished"):
            open_checkpoint(work_of(output))
        report = convert(source, output, **OPTIONS)
        if destination in (DESTINATIONS["the manifest"], DESTINATIONS["the output"]):
            assert report.parts_resumed == report.parts
    assert_same_conversion(output, undisturbed)


def test_thirty_kills_at_random_moments_are_survived(source, output, undisturbed, rng):
    started = time.monotonic()
    assert run_killed_after(None, source, output, OPTIONS) == 0
    duration = time.monotonic() - started
    assert_same_conversion(output, undisturbed)
    killed = 0
    while killed < 30:
        if output.exists():
            assert_same_conversion(output, undisturbed)
            shutil.rmtree(output)
        killed += run_killed_after(rng.uniform(0, duration), source, output, OPTIONS) == KILLED
    if not output.exists():
        convert(source, output, **OPTIONS)
    assert_same_conversion(output, undisturbed)


@pytest.mark.parametrize("moment", ["output.replaced/output", "output"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_while_overwriting_keeps_the_old_folder_or_the_new_one(
    tmp_path, rng, source, undisturbed, output, moment, after
):
    old = tiny.write_folder(tmp_path / "old", tiny.random_tensors(rng))
    convert(old, output)
    options = {**OPTIONS, "overwrite": True}
    assert run_killed_at_rename(output.parent / moment, after, source, output, options) == KILLED
    if output.exists():
        finished = verify(source, output).ok
        assert finished == (moment == "output" and after)
        assert finished or verify(old, output).ok
    else:
        assert verify(old, output.parent / "output.replaced" / "output").ok
    convert(source, output, **options)
    assert_same_conversion(output, undisturbed)


def interrupt(source, output, options=OPTIONS):
    """Leave a conversion with some of its parts finished."""
    part = work_of(output) / "parts" / "layers.00000.experts.00002-00003"
    assert run_killed_at_rename(part, True, source, output, options) == KILLED


def test_a_source_that_changed_meanwhile_is_noticed(source, output, rng):
    interrupt(source, output)
    tensors = tiny.random_tensors(rng)
    time.sleep(0.01)
    tiny.write_folder(source, tensors, shards=2)
    with pytest.raises(CheckpointError, match=r"interrupted conversion of another source(.|\n)*--overwrite"):
        convert(source, output, **OPTIONS)
    assert not output.exists()
    report = convert(source, output, **OPTIONS, overwrite=True)
    assert report.parts_resumed == 0
    np.testing.assert_array_equal(
        open_checkpoint(output).read("embedder.embedding"), tensors["model.embed_tokens.weight"]
    )


def test_an_interrupted_conversion_needs_room_for_what_is_missing_alone(source, output, undisturbed, monkeypatch):
    interrupt(source, output)
    chunks = (file for file in (work_of(output) / "parts").rglob("*") if re.fullmatch(r"\d+(\.\d+)*", file.name))
    needed = sum(array.nbytes for array in tiny.read_folder(source).values())
    needed -= sum(chunk.stat().st_size for chunk in chunks)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - needed, needed))
    assert convert(source, output, **OPTIONS).parts_resumed > 0
    assert_same_conversion(output, undisturbed)


def test_other_options_do_not_go_on_with_what_is_there(source, output):
    interrupt(source, output)
    with pytest.raises(CheckpointError, match="other options"):
        convert(source, output, dtype="bfloat16", **OPTIONS)
    assert convert(source, output, **OPTIONS).parts_resumed > 0


def test_a_folder_in_the_way_that_is_no_conversion_is_left_alone(source, output):
    work_of(output).mkdir()
    (work_of(output) / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        convert(source, output, overwrite=True)
    assert (work_of(output) / "thesis.txt").read_text() == "mine"


def test_a_converted_folder_of_the_same_source_in_another_dtype_is_another_source(tmp_path, source, output):
    convert(source, tmp_path / "rounded", dtype="bfloat16")
    convert(source, tmp_path / "exact")
    options = {**OPTIONS, "dtype": "float32"}
    interrupt(tmp_path / "rounded", output, options)
    with pytest.raises(CheckpointError, match="interrupted conversion of another source"):
        convert(tmp_path / "exact", output, **options)


def save_from_memory(source, output, **options):
    """A converted folder as `save_pretrained` writes one: without the digest of a source."""
    reader = open_checkpoint(source)
    leaves = {path: reader.read(path) for path in reader.shapes}
    write_converted(InMemoryCheckpoint(config=reader.config, leaves=leaves, folder=source), output, **options)


def test_a_conversion_of_a_model_that_was_saved_from_memory_goes_on_too(tmp_path, source, output):
    save_from_memory(source, tmp_path / "saved")
    interrupt(tmp_path / "saved", output)
    report = convert(tmp_path / "saved", output, **OPTIONS)
    assert 0 < report.parts_resumed < report.parts
    assert verify(source, output).ok


def test_a_saved_model_that_was_saved_again_meanwhile_is_another_source(tmp_path, source, output):
    save_from_memory(source, tmp_path / "saved")
    interrupt(tmp_path / "saved", output)
    save_from_memory(source, tmp_path / "saved", overwrite=True)
    with pytest.raises(CheckpointError, match="interrupted conversion of another source"):
        convert(tmp_path / "saved", output, **OPTIONS)


def test_saving_a_model_does_not_discard_an_interrupted_conversion_without_being_told(source, output):
    interrupt(source, output)
    before = tree_of(work_of(output))
    with pytest.raises(CheckpointError, match=r"interrupted conversion of another source(.|\n)*overwrite=True"):
        save_from_memory(source, output)
    assert tree_of(work_of(output)) == before
    assert convert(source, output, **OPTIONS).parts_resumed > 0
    shutil.rmtree(output)
    interrupt(source, output)
    save_from_memory(source, output, overwrite=True)
    assert verify(source, output).ok


def test_a_model_that_was_being_saved_from_memory_is_saved_again_from_the_beginning(
    tmp_path, rng, source, output, monkeypatch
):
    def disk_is_full(*arguments):
        raise OSError("disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("moe_jax.checkpoints.conversion.copy_side_files", disk_is_full)
        with pytest.raises(CheckpointError, match="disk is full"):
            save_from_memory(source, output)
    assert work_of(output).exists()
    trained = tiny.write_folder(tmp_path / "trained", tiny.random_tensors(rng))  # the same parameters, other values
    save_from_memory(trained, output)
    assert verify(trained, output).ok
    assert not work_of(output).exists()


def test_what_says_whose_work_it_is_goes_last_when_it_is_discarded(tmp_path, rng, source, output, removed):
    interrupt(tiny.write_folder(tmp_path / "other", tiny.random_tensors(rng)), output)
    convert(source, output, **OPTIONS, overwrite=True)
    of_the_work = [path.name for path in removed if path.parent == work_of(output)]
    assert of_the_work.index("conversion.json") == 2
    assert set(of_the_work[:2]) == {"parts", "pending"}
