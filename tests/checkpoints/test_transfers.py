"""Bytes arrive whole however few of them the system moves at a time, and few of them are in memory at a time."""

import io
import os
import threading
import time

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import convert, export, open_checkpoint, orbax_part, verify, write_converted

AT_A_TIME = 7


class StingyFile(io.FileIO):
    def write(self, data):
        return super().write(bytes(data[:AT_A_TIME]))


@pytest.fixture
def _stingy_system(monkeypatch):
    """Calls that may move fewer bytes than they were asked to do."""
    real = {name: getattr(os, name) for name in ("copy_file_range", "pread", "preadv", "pwrite", "write")}
    replacements = {
        "copy_file_range": lambda source, target, count, **offset: real["copy_file_range"](
            source, target, min(count, AT_A_TIME), **offset
        ),
        "pread": lambda descriptor, count, offset: real["pread"](descriptor, min(count, AT_A_TIME), offset),
        "preadv": lambda descriptor, buffers, offset: real["preadv"](descriptor, [buffers[0][:AT_A_TIME]], offset),
        "pwrite": lambda descriptor, data, offset: real["pwrite"](descriptor, data[:AT_A_TIME], offset),
        "write": lambda descriptor, data: real["write"](descriptor, data[:5]),  # what `pread` gave is not one write
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(os, name, replacement)
    monkeypatch.setattr(orbax_part, "open", lambda file, mode, buffering: StingyFile(file, mode), raising=False)


@pytest.mark.usefixtures("_stingy_system")
@pytest.mark.parametrize("kernel_copies", [True, False])
def test_a_system_that_moves_few_bytes_at_a_time_loses_none(tmp_path, rng, monkeypatch, kernel_copies):
    if not kernel_copies:
        monkeypatch.setattr(os, "copy_file_range", lambda *arguments, **offset: 0)
    tensors = tiny.random_tensors(rng, dtype=ml_dtypes.bfloat16)
    source = tiny.write_folder(tmp_path / "source", tensors, {**tiny.QWEN3, "torch_dtype": "bfloat16"})
    convert(source, tmp_path / "converted")
    convert(source, tmp_path / "cast", dtype="float32")
    export(tmp_path / "converted", tmp_path / "exported")
    tiny.assert_same_tensors(tiny.read_folder(tmp_path / "exported"), tensors)
    read = open_checkpoint(tmp_path / "cast").read("layers.0.attention.q_proj.kernel")
    np.testing.assert_array_equal(read, tensors["model.layers.0.self_attn.q_proj.weight"].astype(np.float32).T)


@pytest.mark.parametrize("limit", [2000, 100])
def test_values_that_wait_to_be_written_are_bounded_in_bytes(tmp_path, rng, monkeypatch, limit):
    """By the limit, or by the values of one part, if they are more."""
    source = tiny.write_folder(tmp_path / "source", tiny.random_tensors(rng))
    reader = open_checkpoint(source)
    lock, held, largest = threading.Lock(), [0], [0]
    read, write = reader.read_slice, write_converted.__globals__["_write_part"]

    def count(nbytes):
        with lock:
            held[0] += nbytes
            largest[0] = max(largest[0], held[0])

    def read_slice(*arguments):
        values = read(*arguments)
        count(values.nbytes)
        return values

    def write_part(writers, work, name, slices, chunks):
        time.sleep(0.01)  # reading is faster
        write(writers, work, name, slices, chunks)
        count(-sum(values.nbytes for values in slices.values() if isinstance(values, np.ndarray)))

    monkeypatch.setattr(reader, "read_slice", read_slice)
    monkeypatch.setattr("moe_jax.checkpoints.conversion._write_part", write_part)
    monkeypatch.setattr("moe_jax.checkpoints.conversion._MEMORY_BYTES", limit)
    write_converted(reader, tmp_path / "output", dtype="bfloat16", part_bytes=500)
    assert held == [0]
    assert 250 < largest[0] <= max(limit, 500)
    assert verify(source, tmp_path / "output").ok
