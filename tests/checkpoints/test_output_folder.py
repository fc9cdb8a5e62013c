"""Output folders: what may be overwritten, what happens without space, and that two writers don't meet."""

import collections
import fcntl
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_checkpoint as tiny
from interrupted_conversion import run_with_small_files

from moe_jax.checkpoints import CheckpointError, convert, export, open_checkpoint, verify, write_converted
from moe_jax.checkpoints.staging import exclusive


@pytest.fixture
def source(tmp_path, rng):
    return tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


WRITERS = {"convert": convert, "export": export}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_an_existing_output_needs_overwrite(source, output, write):
    write(source, output)
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    with pytest.raises(CheckpointError, match=r"exists(.|\n)*--overwrite"):
        write(source, output)
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before
    write(source, output, overwrite=True)
    assert verify(source, output).ok


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_overwriting_never_removes_a_folder_that_is_no_model(source, output, write):
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a model"):
        write(source, output, overwrite=True)
    assert (output / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("config", ["{}", "[]", '{"model_type": 3}', None], ids=str)
def test_overwriting_never_removes_a_folder_whose_configuration_is_not_that_of_a_model(source, output, write, config):
    output.mkdir()
    (output / "model.safetensors").write_text("mine")
    if config is not None:
        (output / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="is not a model and will not be overwritten"):
        write(source, output, overwrite=True)
    assert (output / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize(
    "stranger", ["thesis.txt", "runs/log", "parts/notes.txt", "parts/mine/log", "tokenizer.json/log"]
)
def test_overwriting_never_removes_what_does_not_belong_to_a_model(source, output, write, stranger):
    convert(source, output)
    (output / stranger).parent.mkdir(exist_ok=True)
    (output / stranger).write_text("mine")
    in_the_way = output / stranger if stranger == "parts/notes.txt" else (output / stranger).parent
    with pytest.raises(CheckpointError, match="will not be overwritten") as caught:
        write(source, output, overwrite=True)
    assert str(output / stranger if in_the_way == output else in_the_way) in str(caught.value)
    assert (output / stranger).read_text() == "mine"
    assert verify(source, output).ok


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("first", WRITERS.values(), ids=WRITERS.keys())
def test_what_a_repository_of_the_hub_holds_may_be_overwritten(source, output, write, first):
    first(source, output)
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", "tokenizer.json", "chat_template.jinja"):
        (output / name).write_text("of the model")
    write(source, output, overwrite=True)
    assert verify(source, output).ok
    assert not (output / "README.md").exists()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_source_inside_the_output_is_never_removed(tmp_path, rng, write, through_a_link):
    big = tiny.write_folder(tmp_path / "big", tiny.random_tensors(rng))
    source = tiny.write_folder(big / "parts" / "src", tiny.random_tensors(rng))
    given = source
    if through_a_link:
        given = tmp_path / "link"
        given.symlink_to(source)
    before = sorted(big.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="lies in this folder, which will not be overwritten"):
            write(given, big, overwrite=overwrite)
    assert sorted(big.rglob("*")) == before


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_link_to_the_source_is_the_same_folder(tmp_path, source, write):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="same folder"):
        write(tmp_path / "link", source, overwrite=True)
    with pytest.raises(CheckpointError, match="same folder"):
        write(source, tmp_path / "link", overwrite=True)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("leads_somewhere", [True, False])
def test_a_link_is_not_overwritten(source, output, write, leads_somewhere):
    other = output.with_name("other")
    if leads_somewhere:
        write(source, other)
    output.symlink_to(other)
    with pytest.raises(CheckpointError, match="is not a folder and will not be overwritten"):
        write(source, output, overwrite=True)
    assert output.is_symlink()
    assert not leads_somewhere or verify(source, other).ok


@pytest.fixture
def no_downloads(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("is downloaded")

    monkeypatch.setattr("moe_jax.checkpoints.hub._download", refuse)


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_an_output_that_may_not_be_written_is_refused_before_anything_is_downloaded(source, output, write):
    write(source, output)
    with pytest.raises(CheckpointError, match="exists; overwrite it"):
        write("owner/model", output)


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("convert", {"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32; got 'int8'"),
        ("convert", {"shards": 0}, "shards must be positive, got 0"),
        ("convert", {"part_bytes": 0}, "part_bytes must be positive, got 0"),
        ("export", {"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32; got 'int8'"),
        ("export", {"form": "bogus"}, "form must be one of per_expert, fused; got 'bogus'"),
        ("export", {"max_shard_bytes": 0}, "max_shard_bytes must be positive, got 0"),
    ],
    ids=str,
)
def test_an_option_that_is_illegal_for_every_model_is_refused_before_anything_is_downloaded(
    output, command, options, message
):
    with pytest.raises(CheckpointError, match=message):
        WRITERS[command]("owner/model", output, **options)
    assert not output.with_name("output.incomplete").exists()


@pytest.mark.parametrize("write", [write_converted, export])
def test_an_output_that_may_not_be_written_is_refused_before_anything_is_read(source, output, write, monkeypatch):
    reader = open_checkpoint(source)
    write(reader, output)
    monkeypatch.setattr(type(reader), "read_slice", None)
    with pytest.raises(CheckpointError, match="exists; overwrite it"):
        write(reader, output)
    assert not output.with_name("output.incomplete").exists()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_overwriting_never_removes_what_happens_to_lie_where_the_old_folder_is_kept(source, output, write):
    replaced = output.with_name("output.replaced")
    write(source, replaced)
    write(source, output)  # nothing is overwritten, so nothing is in the way
    with pytest.raises(CheckpointError, match=r"output\.replaced: is in the way(.|\n)*move it elsewhere"):
        write(source, output, overwrite=True)
    assert verify(source, replaced).ok
    assert verify(source, output).ok
    assert not output.with_name("output.incomplete").exists()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_an_empty_folder_may_be_overwritten(source, output, write):
    output.mkdir()
    write(source, output, overwrite=True)
    assert verify(source, output).ok


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_file_in_the_way_is_refused(source, output, write):
    output.write_text("mine")
    with pytest.raises(CheckpointError, match="not a folder"):
        write(source, output, overwrite=True)
    assert output.read_text() == "mine"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_source_and_output_must_differ(source, write):
    with pytest.raises(CheckpointError, match="same folder"):
        write(source, source, overwrite=True)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_an_empty_name_is_not_the_current_folder(source, output, write, monkeypatch):
    write(source, output)
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    monkeypatch.chdir(output)
    with pytest.raises(CheckpointError, match="the folder to create has an empty name"):
        write(source, "", overwrite=True)
    with pytest.raises(CheckpointError, match="the model to read has an empty name"):
        write("", output.with_name("another"))
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_the_folder_around_another_is_no_output(source, output, write):
    convert(source, output)
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    with pytest.raises(CheckpointError, match="is not a folder that can be created"):
        write(source, output / "parts" / "..", overwrite=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_something_else_where_unfinished_work_is_kept_is_left_alone(source, output, write):
    in_the_way, elsewhere = output.with_name("output.incomplete"), output.with_name("elsewhere")
    in_the_way.write_text("mine")
    with pytest.raises(CheckpointError, match=r"output\.incomplete: is in the way"):
        write(source, output)
    assert in_the_way.read_text() == "mine"
    in_the_way.unlink()
    elsewhere.mkdir()
    in_the_way.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"output\.incomplete: is in the way"):
        write(source, output)
    assert not any(elsewhere.iterdir())


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_the_folder_around_the_output_must_exist(source, tmp_path, write):
    with pytest.raises(CheckpointError, match="does not exist"):
        write(source, tmp_path / "nowhere" / "output")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_too_little_space_is_noticed_before_anything_is_written(source, output, write, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(CheckpointError, match=r"no space left: [\d,]+ bytes are needed, 100 are free"):
        write(source, output)
    tiny.assert_nothing_that_looks_whole(output)
    monkeypatch.undo()
    write(source, output)
    assert verify(source, output).ok


@pytest.mark.parametrize("largest_file", [0, 300, 20_000])
@pytest.mark.parametrize("command", WRITERS)
def test_a_disk_that_refuses_a_write_ends_in_an_error_and_no_output(source, output, command, largest_file):
    if largest_file == 20_000:  # the plan and the small parts fit, the embedding doesn't
        large = {**tiny.QWEN3, "vocab_size": 2000}
        tiny.write_folder(source, tiny.random_tensors(np.random.default_rng(0), large), large)
    message = run_with_small_files(command, largest_file, source, output)
    assert message is not None
    assert "could not be written" in message
    assert "output.incomplete" in message
    tiny.assert_nothing_that_looks_whole(output)
    WRITERS[command](source, output)
    assert verify(source, output).ok


WRITE_PART = """
import pathlib, resource, sys
import numpy as np
from moe_jax.checkpoints.orbax_part import PartWriter
writer = PartWriter()
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))  # less than Orbax needs to describe two arrays
try:
    writer.write(pathlib.Path(sys.argv[1]), {"a.b": np.ones((4, 4)), "a.c": np.ones((4, 4))}, {"a.b": None, "a.c": None})
except (OSError, ValueError):
    sys.exit(3)
"""


def test_what_orbax_fails_to_write_is_raised_and_not_logged_as_well(tmp_path):
    command = [sys.executable, "-c", WRITE_PART, str(tmp_path / "part")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (3, "")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_the_output_while_work_goes_on_is_not_replaced(source, output, command, overwrite):
    def somebody_writes(progress):
        output.mkdir(exist_ok=True)
        (output / "thesis.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="not a model" if overwrite else "exists; overwrite it"):
        WRITERS[command](source, output, overwrite=overwrite, progress=somebody_writes)
    assert (output / "thesis.txt").read_text() == "mine"
    output.rename(output.with_name("thesis"))
    done = []
    WRITERS[command](source, output, progress=done.append)
    assert done[0].done_bytes == done[0].total_bytes  # nothing is written again
    assert verify(source, output).ok
    assert not output.with_name("output.incomplete").exists()


@pytest.mark.parametrize("somebody_begins_again", [False, True])
def test_a_folder_that_is_finished_just_before_it_is_locked_is_not_taken_for_the_work(
    tmp_path, monkeypatch, somebody_begins_again
):
    work = tmp_path / "output.incomplete"
    lock = fcntl.flock

    def finish_before(descriptor, how):
        work.rename(tmp_path / "output")
        if somebody_begins_again:
            work.mkdir()
        lock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", finish_before)
    with pytest.raises(CheckpointError, match="another process was writing to it"), exclusive(work):
        pytest.fail("works in a folder that others may lock")
    monkeypatch.undo()
    with exclusive(work):
        pass


def test_two_conversions_to_the_same_output_do_not_mix(source, output):
    with exclusive(output.with_name("output.incomplete")), pytest.raises(CheckpointError, match="another process"):
        convert(source, output)
