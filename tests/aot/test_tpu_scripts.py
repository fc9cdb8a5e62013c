"""The scripts that compile TPU kernels draw fair problems, compare best with best, and list what failed or was left out."""

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES


@pytest.fixture
def script(monkeypatch):
    """Imports one of the scripts, which lie beside each other."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3-ep8"])
def test_a_token_chooses_an_expert_once_and_zipf_loads_the_busiest_expert_most(script, model):
    programs, shape = script("tpu_programs"), EXPERT_SHAPES[model]
    busiest = {}
    for routing in programs.ROUTINGS:
        chosen = programs.chosen_experts(model, 256, routing)
        assert chosen.shape == (256, shape.top_k)
        assert all(len(set(row)) == shape.top_k for row in chosen.tolist())
        busiest[routing] = np.bincount(chosen.reshape(-1), minlength=shape.num_experts).max()
        local = np.sum(chosen < shape.local_experts)
        assert programs.group_sizes(model, 256, routing).sum() == local
    assert busiest["zipf"] > 2 * busiest["uniform"]


def test_tilings_cut_the_product_evenly_with_the_contraction_whole_and_halved(script):
    megablox = script("tpu_megablox")
    for model in megablox.MODELS:
        shape = EXPERT_SHAPES[model]
        listed = list(megablox.tilings(shape))
        assert {depth for _, depth, _ in listed} == {shape.hidden_size, shape.hidden_size // 2}
        assert all(2 * shape.intermediate_size % columns == 0 for _, _, columns in listed)


def row(program, tiling, bundles):
    figures = {f"{routing} 64": {"bundles": bundles} for routing in ("uniform", "zipf")}
    common = {"tpu": "v6e", "model": "olmoe-1b-7b", "tokens": [64], "code_bundles": 1}
    return {**common, "program": program, "tiling": tiling, **figures}


def test_what_we_choose_is_compared_with_the_best_tiling_of_megablox(script):
    rows = [
        row("grouped", None, 80),
        row("grouped", [128, 64, 256], 60),
        row("megablox", [128, 64, 256], 130),
        row("megablox", [256, 64, 256], 100),
        {"tpu": "v6e", "model": "olmoe-1b-7b", "program": "megablox", "tokens": [64], "left_out": True},
    ]
    uniform, zipf = script("tpu_megablox").comparisons(rows)
    assert (uniform["ratio"], zipf["ratio"]) == (0.8, 0.8)
    assert uniform["megablox"]["tiling"] == [256, 64, 256]
    assert uniform["ours searched"]["bundles"] == 60


def test_a_child_lists_rows_failures_and_what_there_was_no_time_for(script, monkeypatch, capsys, tmp_path):
    def rows_of(job, folder, deadline):
        assert (folder, deadline) == (tmp_path, 5.0)
        if job["case"] == "late":
            raise TimeoutError("no time is left")
        if job["case"] == "wrong":
            raise ValueError("does not compile")
        yield {"bundles": 3}

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([{"case": case} for case in ("good", "late", "wrong")])))
    script("tpu_children").run_as_child([str(tmp_path), "5.0"], rows_of)
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("ROW ")) for line in printed if line.startswith("ROW ")]
    assert rows == [
        {"case": "good", "bundles": 3},
        {"case": "late", "left_out": True},
        {"case": "wrong", "failure": "ValueError: does not compile"},
    ]
    assert printed.count("DONE") == 3


def test_all_programs_are_compiled_those_first_that_need_most_memory(script):
    compiles = script("tpu_compiles")
    found = list(compiles.rounds(compiles.parse_arguments([])))
    assert [(jobs[0]["tokens"], jobs[0]["program"]) for jobs in found[:3]] == [
        (8192, "gradient"),
        (8192, "forward"),
        (8, "gradient"),
    ]
    cases = [tuple(job[key] for key in ("tpu", "model", "tokens", "program")) for jobs in found for job in jobs]
    assert len(cases) == len(set(cases)) == 4 * 8 * 4 * 2


def test_a_kernel_of_several_programs_is_one_and_a_program_is_whole_if_all_of_its_kernels_compile(script):
    def found(tokens, **figures):
        return {"tpu": "7x", "model": "olmoe-1b-7b", "tokens": tokens, "program": "forward", **figures}

    kernel = {"digest": "a", "vmem_bytes": 2**21, "seconds": 3.0}
    rows = [found(8, **kernel), found(128, **kernel), found(128, failure="too large"), found(2048, left_out=True)]
    (line,) = script("tpu_compiles").summary(rows)
    assert line.startswith("7x: 1 kernels compiled, in 3 s of processors, the slowest in 3 s, with up to 2.0 MiB")
    assert line.endswith("1 failed, 1 left out; 1 of 3 programs are whole")


def test_results_of_several_runs_are_merged_and_the_last_one_counts(script, tmp_path):
    files = []
    for number, bundles in enumerate((7, 5)):
        kernel = {"tpu": "v6e", "model": "olmoe-1b-7b", "tokens": 8, "program": "forward", "code_bundles": bundles}
        files.append(tmp_path / f"tpu_kernels_{number}.json")
        files[-1].write_text(json.dumps({"versions": {"jax": "1"}, "rows": [kernel, {**kernel, "left_out": True}]}))
    result = script("tpu_publish").merged(files)
    assert [row["code_bundles"] for row in result["kernels"]] == [5]
    assert result["static"] is True
