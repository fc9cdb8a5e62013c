"""The enumeration of kernels to be compiled covers what models call; its report names every failure."""

import argparse
import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from aot import gpu_kernels

from moe_jax.aot.targets import GpuTarget
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.kernels.mosaic_gpu import matmuls
from moe_jax.kernels.mosaic_gpu.choice import streams_weights
from moe_jax.kernels.mosaic_gpu.limits import SWIZZLES, swizzle_bytes
from moe_jax.kernels.mosaic_gpu.schedule import ROW_ALIGNMENT

REPORT = {
    "registers": 168,
    "shared_memory_bytes": 229440,
    "spill_store_bytes": 0,
    "spill_load_bytes": 0,
    "tensor_core_instructions": 4,
}
GOOD = {"kernel": "rows", "arrays": "[8,8]", "buffers": ["b[8]"], "tokens": [1, 32], "calls": 3, "report": REPORT}


@pytest.mark.parametrize(
    ("program", "tokens", "gpu"),
    [
        ("fused_moe", 1, "h200"),
        ("fused_moe gradient", 4096, "h200"),
        ("fused_moe", 4096, "b200"),
        ("grouped_matmul gradient", 4096, "b200"),
    ],
)
def test_programs_call_kernels_for_every_product(program, tokens, gpu):
    shape = dataclasses.replace(EXPERT_SHAPES["gpt-oss-20b"], hidden_size=256, intermediate_size=128)
    calls = gpu_kernels.traced_kernels(program, shape, tokens, GpuTarget.named(gpu))
    read = {operand.shape for call in calls for operand in call.operands}
    written = {result.shape for call in calls for result in call.results}
    gate_up, down = (64, 128, 256), (32, 256, 128)
    assert down in read
    if program.startswith("fused_moe"):
        assert gate_up in read
    if program.endswith("gradient"):
        assert down in written


def test_the_shape_with_few_tiles_needs_all_sizes_of_row_tiles_but_the_largest(monkeypatch):
    chosen = set()
    choose = matmuls.choose_tiles

    def recording(kernel, **sizes):
        found = choose(kernel, **sizes)
        if kernel.startswith("rows"):
            chosen.add((kernel, sizes.get("projections", 1), found.tiles.rows, found.tiles.columns))
        return found

    monkeypatch.setattr(matmuls, "choose_tiles", recording)
    for program, tokens in itertools.product(gpu_kernels.PROGRAMS, gpu_kernels.FEW_TILES_TOKENS):
        gpu_kernels.traced_kernels(program, gpu_kernels.FEW_TILES, tokens, GpuTarget.named("h200"))
    one_projection = {
        (kernel, 1, *sizes) for kernel in ("rows", "rows_gradient") for sizes in ((64, 128), (128, 64), (128, 128))
    }
    assert chosen >= one_projection | {("rows", 2, 64, 128), ("rows", 2, 128, 64)}


def test_the_irregular_shape_has_a_width_of_each_swizzle_and_rows_that_are_no_multiple_of_8():
    shape = gpu_kernels.IRREGULAR
    widths = (shape.hidden_size, 2 * shape.intermediate_size, shape.intermediate_size)
    assert tuple(swizzle_bytes(width, 2) for width in widths) == SWIZZLES
    streamed, tiled = (shape.expected_rows(tokens) for tokens in gpu_kernels.IRREGULAR_TOKENS)
    assert streamed % ROW_ALIGNMENT
    assert tiled % ROW_ALIGNMENT
    device = GpuTarget.named("h200").device
    assert streams_weights(streamed, shape.local_experts, device)
    assert not streams_weights(tiled, shape.local_experts, device)


def run(monkeypatch, tmp_path, rows):
    monkeypatch.setattr(gpu_kernels, "check_environment", lambda: None)
    monkeypatch.setattr(gpu_kernels, "run_in_child", lambda gpu, model, arguments: rows)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--gpus", "h200", "--models", "olmoe-1b-7b"])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--output", str(tmp_path / "aot")])
    return gpu_kernels.main()


def test_success_is_reported_with_the_figures_and_what_was_not_compiled_twice(monkeypatch, tmp_path, capsys):
    good = {"gpu": "h200", "model": "olmoe-1b-7b", **GOOD, "failures": []}
    assert run(monkeypatch, tmp_path, [good]) == 0
    printed = capsys.readouterr().out
    assert "1-32" in printed
    assert "168        229440  0       4" in printed
    assert f"jax {jax.__version__}: 1 kernels compiled" in printed
    assert "2 more calls differ in numbers of rows only; 0 failures" in printed
    assert json.loads((tmp_path / "aot" / "gpu_kernels.json").read_text())["rows"] == [good]


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "failures": ["20 bytes of spill stores"]},
        {"kernel": "?", "failures": ["exit code -6: the compiler aborted"]},
        {"kernel": "fused_moe", "tokens": [8], "failures": ["NotImplementedError: no such kernel"]},
    ],
    ids=["kernel", "process", "program"],
)
def test_any_failure_fails_the_whole_and_is_listed(monkeypatch, tmp_path, capsys, bad):
    rows = [{"gpu": "h200", "model": "olmoe-1b-7b", **row} for row in ({**GOOD, "failures": []}, bad)]
    assert run(monkeypatch, tmp_path, rows) == 1
    printed = capsys.readouterr().out
    assert "1 failures" in printed
    assert bad["failures"][0] in printed.splitlines()[-1]


def test_finding_no_kernel_at_all_is_a_failure(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, []) == 1


def test_a_process_that_dies_is_a_failure_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    arguments = argparse.Namespace(output=tmp_path, tokens=(1,))
    (row,) = gpu_kernels.run_in_child("h200", "olmoe-1b-7b", arguments)
    assert (row["gpu"], row["model"]) == ("h200", "olmoe-1b-7b")
    assert row["failures"] == ["exit code 1: "]


def test_what_a_compiler_raises_is_a_failure_with_its_words():
    def raises():
        raise NotImplementedError("layout")

    assert gpu_kernels.attempt(raises) == (None, ["NotImplementedError: layout"])
    assert gpu_kernels.attempt(jnp.sign, -3) == (-1, [])
