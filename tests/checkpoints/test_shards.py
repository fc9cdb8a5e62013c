"""Folders laid out for several devices: where parts and chunks end, and that nothing else changes."""

import json
import os

import numpy as np
import pytest
import tensorstore as ts
from support import golden_cases

from moe_jax.checkpoints import CheckpointError, convert, export, open_checkpoint, verify

CASE = golden_cases.golden_case("qwen2_moe", "window_in_even_layers")  # 12 experts, shared experts, a dense layer
EXPERTS = ".routed_experts."


@pytest.fixture(scope="module", params=["per_expert", "fused"])
def source(request):
    return CASE.folder(request.param)


@pytest.fixture(scope="module")
def output(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "converted"
    convert(source, output, shards=4, part_bytes=40_000)
    return output


def bytes_read():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_every_value_is_that_of_the_source(source, output):
    assert verify(source, output).ok
    original, copy = open_checkpoint(source), open_checkpoint(output)
    for path in original.shapes:
        np.testing.assert_array_equal(copy.read(path), original.read(path), err_msg=path)


def test_no_part_reaches_over_the_end_of_a_share(output):
    manifest = json.loads((output / "moe_jax.json").read_text())
    assert manifest["shards"] == 4
    groups = [span for part in manifest["parts"].values() for path, span in part.items() if EXPERTS in path]
    assert groups
    assert all(start // 3 == (stop - 1) // 3 for start, stop in groups)  # each of four devices holds 3 of 12 experts


def test_a_device_reads_its_share_of_what_is_split_and_hardly_more(output):
    copy = open_checkpoint(output)
    mixture = f"layers.{copy.decoder.moe_layers[0]}.feed_forward"
    cases = {
        "embedder.embedding": 0,
        "layers.0.attention.q_proj.kernel": 1,
        "layers.0.attention.o_proj.kernel": 0,
        f"{mixture}.routed_experts.down_proj": 0,
        f"{mixture}.shared_experts.down_proj.kernel": 0,
    }
    assert cases.keys() <= copy.shapes.keys()
    for path, axis in cases.items():
        shape = copy.shapes[path]
        share = shape[axis] // 4
        region = [slice(0, length) for length in shape]
        region[axis] = slice(share, 2 * share)
        before = bytes_read()
        values = copy.read_region(path, tuple(region))
        assert values.nbytes <= bytes_read() - before <= values.nbytes + 600, path  # and a description of the array
        np.testing.assert_array_equal(values, copy.read(path)[tuple(region)], err_msg=path)


def test_a_device_reads_its_share_of_safetensors_along_outputs_and_experts(monkeypatch):
    read = []
    real = os.preadv
    monkeypatch.setattr("os.preadv", lambda *arguments: read.append(real(*arguments)) or read[-1])
    reader = open_checkpoint(CASE.folder("per_expert"))
    mixture = f"layers.{reader.decoder.moe_layers[0]}.feed_forward"
    cases = {
        "embedder.embedding": 0,
        "layers.0.attention.q_proj.kernel": 1,
        f"{mixture}.routed_experts.gate_up_proj": 0,
    }
    for path, axis in cases.items():
        region = [slice(0, length) for length in reader.shapes[path]]
        region[axis] = slice(0, reader.shapes[path][axis] // 4)
        read.clear()
        assert reader.read_region(path, tuple(region)).nbytes == sum(read)


def test_regions_of_any_source_are_those_of_the_whole(source, output, rng):
    for reader in (open_checkpoint(source), open_checkpoint(output)):
        for path, shape in list(reader.shapes.items())[:20]:
            bounds = [sorted(rng.integers(0, length + 1, 2)) for length in shape]
            region = tuple(slice(int(start), int(stop)) for start, stop in bounds)
            np.testing.assert_array_equal(reader.read_region(path, region), reader.read(path)[region], err_msg=path)


def test_a_number_of_devices_that_divides_nothing_is_legal(source, tmp_path):
    convert(source, tmp_path / "converted", shards=7)
    assert verify(source, tmp_path / "converted").ok


def test_a_share_may_be_larger_than_a_part(source, tmp_path):
    convert(source, tmp_path / "converted", shards=2, part_bytes=1000)
    parts = json.loads((tmp_path / "converted" / "moe_jax.json").read_text())["parts"]
    assert sum("embedder.embedding" in slices for slices in parts.values()) > 2
    assert verify(source, tmp_path / "converted").ok


def test_exporting_gives_the_same_files_as_without_shards(source, output, tmp_path):
    convert(source, tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "a")
    export(output, tmp_path / "b")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_no_devices_are_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="shards must be positive, got 0"):
        convert(source, tmp_path / "converted", shards=0)
    assert not list(tmp_path.iterdir())
