"""A safetensors file is refused, with file and tensor named, unless its header describes its bytes exactly."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import CheckpointError
from moe_jax.checkpoints.safetensors_file import read_header


@pytest.fixture
def tensors(rng):
    return {
        "first": rng.standard_normal((3, 4)).astype(np.float32),
        "second": rng.standard_normal(5).astype(np.float16),
    }


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.safetensors"


def data_of(tensors):
    return b"".join(array.tobytes() for array in tensors.values())


def refuses(file, *words):
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    for word in (str(file), *words):
        assert word in str(caught.value)


def test_every_tensor_of_an_honest_file_is_read_bit_by_bit(file, rng):
    tensors = {
        "matrix": rng.standard_normal((3, 4)).astype(np.float32),
        "half": rng.standard_normal((2, 0, 3)).astype(np.float16),
        "brain": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "eight": rng.integers(0, 256, (4, 4), np.uint8).view(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(2.5, np.float32),
    }
    tiny.write_file(file, tensors)
    entries = {entry.name: entry for entry in read_header(file)}
    tiny.assert_same_tensors({name: entry.read() for name, entry in entries.items()}, tensors)
    np.testing.assert_array_equal(entries["matrix"].read(1, 3), tensors["matrix"][1:3])


def test_files_of_the_safetensors_package_are_read(file, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, file)
    tiny.assert_same_tensors({entry.name: entry.read() for entry in read_header(file)}, tensors)


def test_a_file_shorter_than_its_length_field_is_refused(file):
    file.write_bytes(b"abc")
    refuses(file, "3 bytes")


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused_without_allocating_it(file, tensors, length):
    tiny.write_raw(file, json.dumps(tiny.header_of(tensors)), data_of(tensors), length=length)
    refuses(file, str(length))


DEEP = "[" * 100_000 + "]" * 100_000
NO_JSON = [
    "{",
    "[1, 2]",
    '"text"',
    b"\xff\xfe{}",
    "",
    "{} trailing",
    DEEP,
    f'{{"first": {DEEP}}}',
    f'{{"first": {"9" * 5000}}}',
]


@pytest.mark.parametrize("header", NO_JSON, ids=range(len(NO_JSON)))
def test_a_header_that_is_no_json_object_is_refused(file, header):
    tiny.write_raw(file, header, b"")
    refuses(file, "header")


def test_a_header_that_names_a_tensor_twice_is_refused(file, tensors):
    entry = json.dumps(tiny.header_of(tensors)["first"])
    tiny.write_raw(file, f'{{"first": {entry}, "first": {entry}}}', data_of(tensors))
    refuses(file, "first", "twice")


def test_a_truncated_file_is_refused(file, tensors):
    tiny.write_file(file, tensors)
    file.write_bytes(file.read_bytes()[:-1])
    refuses(file, "second", "truncated")


def test_bytes_left_over_at_the_end_are_refused(file, tensors):
    tiny.write_file(file, tensors)
    file.write_bytes(file.read_bytes() + b"\0")
    refuses(file, "1 bytes at the end")


LIES = {
    "shape bigger than the bytes": ({"shape": [3, 5]}, "needs 60 bytes"),
    "shape smaller than the bytes": ({"shape": [3, 3]}, "needs 36 bytes"),
    "huge shape": ({"shape": [2**40, 2**40]}, "shape"),
    "negative size": ({"shape": [-3, -4]}, "shape must be a list of sizes"),
    "shape is no list": ({"shape": 12}, "shape must be a list of sizes"),
    "fractional size": ({"shape": [3.0, 4]}, "shape must be a list of sizes"),
    "boolean size": ({"shape": [True, 12]}, "shape must be a list of sizes"),
    "unknown dtype": ({"dtype": "F12"}, "unknown dtype 'F12'"),
    "dtype is no name": ({"dtype": ["F32"]}, "unknown dtype"),
    "other dtype": ({"dtype": "F16"}, "needs 24 bytes"),
    "end before begin": ({"data_offsets": [48, 0]}, "data_offsets"),
    "negative offset": ({"data_offsets": [-48, 0]}, "data_offsets must be two positions"),
    "one offset": ({"data_offsets": [48]}, "data_offsets must be two positions"),
    "beyond the file": ({"data_offsets": [10, 58]}, "first"),
    "four bytes too late": ({"data_offsets": [4, 52]}, "4 bytes before it belong to no tensor"),
    "far beyond the file": ({"data_offsets": [10**9, 10**9 + 48]}, "belong to no tensor"),
}


@pytest.mark.parametrize(("lie", "words"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_about_a_tensor_is_refused(file, tensors, lie, words):
    header = tiny.header_of(tensors)
    header["first"] |= lie
    tiny.write_raw(file, json.dumps(header), data_of(tensors))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert str(file) in message
    assert "first" in message or "second" in message
    assert words in message


def test_tensors_that_overlap_are_refused(file, tensors):
    header = tiny.header_of(tensors)
    header["second"]["data_offsets"] = [44, 54]
    tiny.write_raw(file, json.dumps(header), data_of(tensors))
    refuses(file, "second", "overlap")


def test_a_hole_between_tensors_is_refused(file, tensors):
    header = tiny.header_of(tensors)
    header["second"]["data_offsets"] = [50, 60]
    tiny.write_raw(file, json.dumps(header), data_of(tensors) + b"\0\0")
    refuses(file, "second", "belong to no tensor")


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_a_tensor_without_its_description_is_refused(file, tensors, missing):
    header = tiny.header_of(tensors)
    del header["second"][missing]
    tiny.write_raw(file, json.dumps(header), data_of(tensors))
    refuses(file, "second", missing)


@pytest.mark.parametrize("kernel", ["copies", errno.EXDEV, errno.EPERM, "says that the file ends"])
def test_rows_are_copied_from_file_to_file_with_and_without_the_kernels_help(file, rng, monkeypatch, kernel):
    tensors = {"big": rng.integers(0, 256, (5, 1 << 20), np.uint8), "small": rng.integers(0, 256, (4, 3), np.uint8)}
    tiny.write_file(file, tensors)
    if kernel != "copies":

        def refuse(*arguments, **kwargs):
            if isinstance(kernel, int):
                raise OSError(kernel, os.strerror(kernel))
            return 0

        monkeypatch.setattr(os, "copy_file_range", refuse)
    entries = {entry.name: entry for entry in read_header(file)}
    target = file.with_name("target")
    with open(target, "wb", buffering=0) as stream:
        entries["small"].range_of(range(1, 3)).copy_to(stream.fileno())
        entries["big"].range_of(range(5)).copy_to(stream.fileno())
    assert target.read_bytes() == tensors["small"][1:3].tobytes() + tensors["big"].tobytes()
    file.write_bytes(file.read_bytes()[:-1])
    with open(target, "wb", buffering=0) as stream, pytest.raises(CheckpointError, match="ends inside small"):
        entries["small"].range_of(range(4)).copy_to(stream.fileno())


def test_a_disk_that_is_full_is_an_error_of_writing_and_a_bad_one_of_reading(file, tensors, monkeypatch):
    tiny.write_file(file, tensors)
    entry = read_header(file)[0]
    with open("/dev/full", "wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        entry.range_of(range(entry.num_rows)).copy_to(stream.fileno())

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments, **kwargs: 0)
    with (
        open(file.with_name("target"), "wb", buffering=0) as stream,
        pytest.raises(CheckpointError, match=f"{file.name}: cannot read {entry.name}: Input/output error"),
    ):
        entry.range_of(range(entry.num_rows)).copy_to(stream.fileno())


def test_a_file_that_shrinks_after_it_was_opened_is_noticed_when_read(file, tensors):
    tiny.write_file(file, tensors)
    entries = {entry.name: entry for entry in read_header(file)}
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="second"):
        entries["second"].read()
