"""Files of tuned tiles, and the tile sizes that are worth measuring."""

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.mosaic_gpu import tuning
from moe_jax.kernels.mosaic_gpu.choice import choose_tiles
from moe_jax.kernels.mosaic_gpu.stream_tiles import default_stream_tiles
from moe_jax.kernels.mosaic_gpu.tiles import RowTiles, StreamTiles, WeightsGradientTiles
from moe_jax.kernels.mosaic_gpu.tuning import (
    Entry,
    KernelShape,
    Tuned,
    read_entries,
    trying,
    tuned_tiles,
    write_entries,
)
from moe_jax.kernels.mosaic_gpu.tuning_candidates import candidates, check_tiles

SHAPE = KernelShape(groups=8, width_in=4096, width_out=1536, projections=2, dtype="bfloat16", rows_bucket=512)
TILES = RowTiles(rows=128, columns=128, depth=64, stages=4, panel=8)
OTHER_TILES = RowTiles(rows=64, columns=64, depth=64, stages=6, panel=1)
SHAPES_OF_MODELS = [
    KernelShape(
        groups=shape.local_experts,
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        dtype="bfloat16",
        rows_bucket=rows,
    )
    for shape in EXPERT_SHAPES.values()
    for width_in, width_out, projections in (
        (shape.hidden_size, shape.intermediate_size, 2),
        (shape.intermediate_size, shape.hidden_size, 1),
    )
    for rows in (4, 512)
]


def entry(**changes):
    fields = dict(
        kernel="rows",
        shape=SHAPE,
        tiles=TILES,
        microseconds=10.0,
        default_microseconds=12.5,
        measured="2026-11-21, jax 0.12.0",
    )
    return Entry(**{**fields, **changes})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, and nothing in the package's."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "committed_file", lambda device: tmp_path / "package" / f"{device}.json")
    return tmp_path / "cache"


def test_a_shape_without_an_entry_has_no_tuned_tiles():
    assert tuned_tiles("rows", SHAPE, "h200") is None


def test_an_entry_is_found_by_kernel_shape_and_device_only():
    write_entries(tuning.committed_file("h200"), "h200", [entry()])
    found = tuned_tiles("rows", SHAPE, "h200")
    assert found.tiles == TILES
    assert "the package" in found.source
    assert "h200.json" in found.source
    assert tuned_tiles("rows_gradient", SHAPE, "h200") is None
    assert tuned_tiles("rows", SHAPE, "h100") is None
    for field, value in dict(
        groups=9, width_in=4097, width_out=1537, projections=1, dtype="float16", rows_bucket=1024
    ).items():
        assert tuned_tiles("rows", dataclasses.replace(SHAPE, **{field: value}), "h200") is None


def test_the_users_entry_comes_before_the_packages(cache):
    write_entries(tuning.committed_file("h200"), "h200", [entry()])
    write_entries(tuning.user_file("h200"), "h200", [entry(tiles=OTHER_TILES)])
    assert tuning.user_file("h200").is_relative_to(cache)
    found = tuned_tiles("rows", SHAPE, "h200")
    assert found.tiles == OTHER_TILES
    assert "the user's cache" in found.source


def test_files_are_read_once_per_process_and_again_after_writing():
    file = tuning.user_file("h200")
    write_entries(file, "h200", [entry()])
    assert tuned_tiles("rows", SHAPE, "h200").tiles == TILES
    text = file.read_text()
    file.write_text("broken behind our back")
    assert tuned_tiles("rows", SHAPE, "h200").tiles == TILES
    file.write_text(text)
    write_entries(file, "h200", [entry(tiles=OTHER_TILES)])
    assert tuned_tiles("rows", SHAPE, "h200").tiles == OTHER_TILES


def test_tiles_that_are_tried_come_before_every_entry_of_that_kernel_alone():
    write_entries(tuning.user_file("h200"), "h200", [entry(), entry(kernel="rows_gradient")])
    with trying("rows", OTHER_TILES):
        assert tuned_tiles("rows", SHAPE, "h200").tiles == OTHER_TILES
        assert tuned_tiles("rows_gradient", SHAPE, "h200").tiles == TILES
    with trying("rows", None):
        assert tuned_tiles("rows", SHAPE, "h200") is None
    assert tuned_tiles("rows", SHAPE, "h200").tiles == TILES


def test_a_tuned_entry_without_room_for_a_float32_result_gives_way_to_the_default_with_the_reason():
    device = GPU_DEVICES["h200"]
    sizes = dict(num_rows=648, num_groups=64, width_in=32, width_out=1760, dtype=jnp.dtype(jnp.bfloat16), device=device)
    full = StreamTiles(rows=32, columns=256, depth=32, stages=11, splits=1)
    shape = KernelShape(groups=64, width_in=32, width_out=1760, projections=1, dtype="bfloat16", rows_bucket=8)
    write_entries(tuning.user_file("h200"), "h200", [entry(kernel="stream", shape=shape, tiles=full)])
    rounded, wide = (choose_tiles("stream", **sizes, output_dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert rounded.tiles == full
    assert wide.tiles == default_stream_tiles(648, 64, 32, 1760, 1, 2, device, output_itemsize=4)
    assert re.search("analytic default, tuned entry of the user's cache.*with a float32 result, h200 has", wide.reason)


def test_tuned_tiles_can_be_static_arguments():
    assert len({Tuned(TILES, "a"), Tuned(dataclasses.replace(TILES), "a"), Tuned(OTHER_TILES, "a")}) == 2


def test_writing_replaces_entries_of_the_same_key_and_keeps_the_others(tmp_path):
    file = tmp_path / "h200.json"
    gradient = WeightsGradientTiles(out_columns=128, in_columns=128, depth=64, stages=4, panel=8)
    stream = StreamTiles(rows=8, columns=64, depth=128, stages=6, splits=4)
    write_entries(file, "h200", [entry(), entry(kernel="weights_gradient", tiles=gradient)])
    write_entries(file, "h200", [entry(tiles=OTHER_TILES), entry(kernel="stream", tiles=stream)])
    assert {e.kernel: e.tiles for e in read_entries(file, "h200")} == {
        "rows": OTHER_TILES,
        "weights_gradient": gradient,
        "stream": stream,
    }
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "h200.json"
    write_entries(file, "h200", [entry()])
    before = file.read_bytes()

    def refuse(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(tuning.os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_entries(file, "h200", [entry(tiles=OTHER_TILES)])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_the_same_entries_give_the_same_file_in_any_order(tmp_path):
    entries = [entry(shape=dataclasses.replace(SHAPE, rows_bucket=rows)) for rows in (0, 1, 64)]
    write_entries(tmp_path / "a.json", "h200", entries)
    write_entries(tmp_path / "b.json", "h200", entries[::-1])
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def changed(**changes):
    return {**dataclasses.asdict(entry()), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (b'"\xff"', "is not JSON: 'utf-8' codec can't decode"),
        ([], "must be an object of format, device and entries"),
        ({"format": 2, "device": "h200", "entries": []}, "format must be 1, got 2"),
        ({"format": 1, "device": "h100", "entries": []}, "device must be 'h200', got 'h100'"),
        ([changed(kernel="colums")], "entry 0: unknown kernel 'colums'; legal are rows,"),
        ([changed(kernel=["rows"])], "entry 0: unknown kernel"),
        ([changed(tiles={"rows": 128})], "entry 0, tiles: must have exactly columns, depth, panel, rows, stages"),
        ([changed(tiles={**dataclasses.asdict(TILES), "depth": 0})], "tiles: depth must be an integer of at least 1"),
        ([changed(tiles={**dataclasses.asdict(TILES), "depth": "64"})], "tiles: depth must be an integer"),
        ([changed(shape={**dataclasses.asdict(SHAPE), "groups": 8.0})], "shape: groups must be an integer"),
        ([changed(shape={**dataclasses.asdict(SHAPE), "rows_bucket": 96})], "rows_bucket must be 0 or a power of two"),
        ([changed(shape={**dataclasses.asdict(SHAPE), "dtype": "int8"})], "dtype must be bfloat16 or float16"),
        ([changed(), changed(kernel="stream")], "entry 1, tiles: must have exactly columns, depth, rows, splits"),
        ([changed(), changed()], "entries 0 and 1: both are rows for 8 groups"),
        ([changed(microseconds=0)], "microseconds must be a positive number"),
        ([changed(measured=None)], "measured must be a text"),
        ([changed(speed=1)], "entry 0: must have exactly"),
        (["rows"], "entry 0: must have exactly"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_broken_file_is_an_error_that_names_the_file_and_the_entry(content, message):
    file = tuning.user_file("h200")
    file.parent.mkdir(parents=True)
    if isinstance(content, list) and content:
        content = {"format": 1, "device": "h200", "entries": content}
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tuned_tiles("rows", SHAPE, "h200")
    assert str(file) in str(error.value)


def refuse_to_read(error):
    def read_text(self, **kwargs):
        if "cache" in self.parts:
            raise error
        return READ_TEXT(self, **kwargs)

    return read_text


READ_TEXT = Path.read_text
UNREADABLE = [
    PermissionError("permission denied"),
    NotADirectoryError("not a directory"),
    OSError("input/output error"),
]


@pytest.mark.parametrize("error", UNREADABLE, ids=repr)
def test_a_file_that_cannot_be_read_is_an_error_in_the_folder_that_was_asked_for(error, monkeypatch):
    monkeypatch.setattr(Path, "read_text", refuse_to_read(error))
    with pytest.raises(ValueError, match=f"h200.json cannot be read: {error}; MOE_JAX_CACHE must name") as raised:
        tuned_tiles("rows", SHAPE, "h200")
    assert str(tuning.user_file("h200")) in str(raised.value)


@pytest.mark.parametrize("error", UNREADABLE, ids=repr)
def test_a_file_that_cannot_be_read_counts_as_absent_in_the_platforms_folder(error, monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "read_text", refuse_to_read(error))
    assert tuned_tiles("rows", SHAPE, "h200") is None
    write_entries(tuning.committed_file("h200"), "h200", [entry()])
    assert tuned_tiles("rows", SHAPE, "h200").tiles == TILES


def test_without_a_home_folder_the_user_has_no_entries(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOE_JAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert tuned_tiles("rows", SHAPE, "h200") is None


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="unknown kernel 'columns'; legal are rows, rows_gradient, stream"):
        tuned_tiles("columns", SHAPE, "h200")
    with pytest.raises(ValueError, match="unknown kernel 'columns'"):
        candidates("columns", SHAPE, GPU_DEVICES["h200"])


@pytest.mark.parametrize(
    ("num_rows", "groups", "bucket"),
    [(0, 4, 0), (3, 4, 0), (4, 4, 1), (7, 4, 1), (8, 4, 2), (1023, 4, 128), (1024, 4, 256), (4099, 1, 4096)],
)
def test_rows_are_counted_in_powers_of_two(num_rows, groups, bucket):
    assert tuning.rows_bucket(num_rows, groups) == bucket


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tuning.cache_folder() == tmp_path / ".cache" / "moe_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_folder() == tmp_path / "xdg" / "moe_jax"
    monkeypatch.setattr(tuning.sys, "platform", "darwin")
    assert tuning.cache_folder() == tmp_path / "Library" / "Caches" / "moe_jax"


@pytest.mark.parametrize("device", ["h200", "b200"])
@pytest.mark.parametrize("kernel", tuning.TILES_OF_KERNEL)
def test_candidates_exist_differ_and_are_accepted_by_their_kernel(kernel, device):
    for shape in SHAPES_OF_MODELS:
        found = candidates(kernel, shape, GPU_DEVICES[device])
        assert 4 <= len(found) == len(set(found)) <= 200
        assert {type(tiles) for tiles in found} == {tuning.TILES_OF_KERNEL[kernel]}
        for tiles in found:
            check_tiles(tiles, shape, GPU_DEVICES[device])


def check_committed_file(file):
    """Raise ValueError unless its entries can be used on the device that it is named after, and gain something there."""
    for entry in read_entries(file, file.stem):
        check_tiles(entry.tiles, entry.shape, GPU_DEVICES[file.stem])
        if not entry.microseconds < entry.default_microseconds:
            raise ValueError(f"{entry} is not faster than the default")


def test_committed_entries_can_be_read_are_accepted_by_their_kernels_and_gain_something(monkeypatch):
    monkeypatch.undo()
    files = sorted(tuning.committed_file("h200").parent.glob("*"))
    assert [file.name for file in files] == ["h200.json"]
    for file in files:
        check_committed_file(file)


def test_the_check_of_committed_entries_accepts_a_good_one_and_finds_a_bad_one(tmp_path):
    file = tmp_path / "h200.json"
    write_entries(file, "h200", [entry()])
    check_committed_file(file)
    too_large = dataclasses.replace(TILES, stages=64)
    for bad, message in (
        (entry(tiles=too_large), "shared memory"),
        (entry(microseconds=12.5), "not faster than the default"),
    ):
        write_entries(file, "h200", [bad])
        with pytest.raises(ValueError, match=message):
            check_committed_file(file)


@pytest.mark.parametrize("kernel", ["rows", "rows_gradient"])
def test_candidates_for_wide_results_fill_the_last_tile_of_widths_that_256_leaves_mostly_empty(kernel):
    shape = dataclasses.replace(SHAPE, width_in=2880, width_out=2880, projections=1)
    widths = {tiles.columns for tiles in candidates(kernel, shape, GPU_DEVICES["h200"])}
    assert {64, 128, 192, 256} <= widths
    emptiness = {width: -(-2880 // width) * width / 2880 - 1 for width in widths}
    assert emptiness[192] == 0 < 0.06 < emptiness[256]


def test_candidates_do_not_reach_far_beyond_a_small_shape():
    small = dataclasses.replace(SHAPE, width_in=64, width_out=40)
    assert {(tiles.columns, tiles.depth) for tiles in candidates("rows", small, GPU_DEVICES["h200"])} <= {
        (64, 64),
        (128, 64),
    }
