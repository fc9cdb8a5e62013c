"""Real processes on one machine, joined by gloo: they compute what one process computes, from their shares."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import golden_cases, processes

from moe_jax.checkpoints import convert, open_checkpoint

CASE = golden_cases.golden_case("qwen3_moe", "raw_probabilities")
FOLDER = Path(__file__).parent


def reports(folder, *, count, devices):
    """What each of `count` processes found."""
    convert(CASE.folder("per_expert"), folder / "converted", shards=count * devices)
    command = [str(FOLDER / "layer_and_model.py"), "{coordinator}", "{count}", "{number}"]
    command += [str(CASE.folder("per_expert")), str(folder / "converted"), str(folder / "saved")]
    outputs = processes.run(command, count=count, devices=devices, folder=folder, timeout=600)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module", params=[(2, 2), pytest.param((4, 1), marks=pytest.mark.slow)], ids=["2", "4"])
def job(request, tmp_path_factory):
    count, devices = request.param
    folder = tmp_path_factory.mktemp("job")
    return folder, reports(folder, count=count, devices=devices)


def test_all_processes_see_all_devices(job):
    for report in job[1]:
        assert (report["processes"], report["devices"]) == (len(job[1]), 4)


def test_a_layer_over_processes_equals_the_layer_on_one_device(job):
    for report in job[1]:
        assert len(report["layer_errors"]) == 4
        assert all(error < 1e-5 for error in report["layer_errors"].values()), report["layer_errors"]


def test_experts_change_processes_and_no_output_changes(job):
    first = job[1][0]["balancing"]
    for report in (report["balancing"] for report in job[1]):
        assert max(report["errors"]) < 1e-5
        assert report["sent"] > 0
        assert (report["load"], report["recorded"]) == ([4, 0, 0, 0, 12, 12, 0, 4], 1)
        assert report["placement"] == first["placement"] != [[*range(8), *range(4)]]


def test_a_model_that_was_moved_is_the_one_that_is_loaded_there(job):
    assert all(report["same_if_moved"] for report in job[1])


def test_a_model_over_processes_has_the_logits_of_transformers(job):
    for report in job[1]:
        assert report["logits_error"] < 1e-4


def test_each_process_reads_the_bytes_that_its_devices_hold(job):
    stored = sum(leaf.nbytes for leaf in open_checkpoint(job[0] / "converted").manifest.leaves.values())
    for report in job[1]:
        descriptions = 512 * 200  # every array has a few hundred bytes that say what it is
        assert report["bytes_held"] < 0.75 * stored
        assert report["bytes_held"] <= report["bytes_read"] < report["bytes_held"] + descriptions
        assert report["same_from_safetensors"]


def test_generated_tokens_are_those_of_transformers_and_equal_on_all_processes(job):
    first, *others = job[1]
    greedy = CASE.expected().greedy_tokens[:2, :6]
    np.testing.assert_array_equal(first["coldest"], greedy)
    assert not np.array_equal(first["drawn"], greedy)
    for report in others:
        assert report["coldest"] == first["coldest"]
        assert report["drawn"] == first["drawn"]


def test_what_keeps_a_model_from_being_saved_is_raised_on_all_processes(job):
    for report in job[1]:
        taken, full, unread = report["failed_saves"]
        assert taken == f"{job[0] / 'taken'}: exists; overwrite it with --overwrite (overwrite=True)"
        assert full == "full.incomplete: no space left for part 2"
        assert unread == "embedder.embedding: cannot be read"


def test_a_model_saved_by_all_processes_is_the_one_that_was_loaded(job):
    original, saved = open_checkpoint(job[0] / "converted"), open_checkpoint(job[0] / "saved")
    assert original.shapes == saved.shapes
    for path in original.shapes:
        np.testing.assert_array_equal(saved.read(path), original.read(path), err_msg=path)
