"""The GPU suite's tables and files."""

import json

import pytest

from moe_jax.benchmarking.gpu_report import (
    BEGIN,
    END,
    OURS,
    bars,
    markdown,
    replace_between_markers,
    write_results,
)


def row(**changes):
    return {
        "case": "forward/mixtral-8x7b/T2048/uniform",
        "kind": "forward",
        "shape": "mixtral-8x7b",
        "tokens": 2048,
        "routing": "uniform",
        "contestant": OURS,
        "mean_rows": 512.0,
        "weight_bytes": 2.8e9,
        "flops": 1e12,
        "seconds": 2e-3,
        "call_seconds": 2e-3,
        "busy_seconds": 1.9e-3,
        "matmul_share": 0.82,
        "block_share": 0.75,
        "bandwidth_share": 0.4,
        "ceiling_128": 0.88,
        "ceiling_64": 0.94,
    } | changes


def result(rows, **changes):
    return {
        "rehearsal": False,
        "command": "python benchmarks/gpu.py",
        "date": "2026-11-21T00:00:00+00:00",
        "device": "NVIDIA H200",
        "device_name": "h200",
        "versions": {"jax": "0.11.2"},
        "ceilings": {"dense_flops": 7.9e14, "copy_bytes": 4.3e12, "launch_seconds": 5e-6, "timer": "by device events"},
        "rows": rows,
        "not_reached": [],
    } | changes


def bar(rows, what):
    return next(bar for bar in bars(rows) if bar.what.startswith(what))


def test_a_bar_is_judged_by_the_worst_of_its_cells():
    rows = [row(), row(case="other", matmul_share=0.79), row(case="small", mean_rows=256.0, matmul_share=0.71)]
    found = bar(rows, "forward, 512")
    assert (found.measured, found.where, found.met) == (0.79, "other", False)
    assert bar(rows, "forward, 256").met is True
    assert bar(rows, "backward").met is None


def test_wrong_and_foreign_rows_do_not_count():
    rows = [row(), row(contestant="moe_jax xla", matmul_share=0.1), row(seconds=None, matmul_share=0.1, failed="wrong")]
    assert bar(rows, "forward, 512").met is True


def test_bandwidth_counts_where_many_weights_are_touched_by_few_rows():
    few = dict(mean_rows=2.0, bandwidth_share=0.8)
    assert bar([row(**few)], "decode").met is False
    assert bar([row(**few, weight_bytes=75e6)], "decode").met is None
    assert bar([row(mean_rows=9.0, bandwidth_share=0.1)], "decode").met is None


def test_gradients_of_weights_may_take_a_little_longer_than_those_of_rows():
    backward = dict(kind="backward", matmul_share=0.7)
    assert bar([row(**backward, gradient_ratio=1.29), row(**backward, gradient_ratio=0.9)], "weight").met is True
    assert bar([row(**backward, gradient_ratio=1.31), row(**backward, gradient_ratio=0.9)], "weight").met is False


def test_the_speed_up_is_that_of_the_same_case():
    torch = dict(contestant="torch grouped_mm", matmul_share=None)
    rows = [row(), row(**torch, call_seconds=3e-3), row(case="other", **torch, call_seconds=1e-3)]
    found = bar(rows, "whole block over torch")
    assert found.measured == pytest.approx(1.5)
    assert found.met is True
    assert bar(rows, "whole block over tokamax").met is None


def test_queued_calls_are_compared_with_queued_calls_and_programs_with_programs():
    torch = row(contestant="torch grouped_mm", matmul_share=None, call_seconds=3e-3, in_program_seconds=1e-3)
    rows = [row(in_program_seconds=5e-4), torch]
    assert bar(rows, "whole block over torch").measured == pytest.approx(1.5)
    assert bar(rows, "whole block over torch grouped_mm, in one program").measured == pytest.approx(2.0)
    without_graph = [row(in_program_seconds=5e-4), torch | {"in_program_seconds": None}]
    assert bar(without_graph, "whole block over torch grouped_mm, in one program").met is None


def test_the_tables_hold_every_measurement_and_every_miss():
    rows = [
        row(matmul_share=0.5, ceiling_waves=0.97),
        row(
            mean_rows=2.0,
            tokens=8,
            in_program_seconds=1.9e-5,
            splits={"gate_up": 4, "down": 1},
            second_pass_seconds=3e-6,
        ),
        row(kind="backward", gradient_ratio=1.1, rows_gradient_seconds=1e-3, weights_gradient_seconds=1.1e-3),
        row(contestant="tokamax.ragged_dot", seconds=None, failed="RuntimeError: a | b\nlong trace"),
    ]
    text = markdown(result(rows, not_reached=["x", "y"]))
    assert "dense bf16 matmul 790 TFLOP/s, copy 4.30 TB/s" in text
    assert (
        "| forward, 512 rows per expert and more | ≥ 0.8 | 0.5 | forward/mixtral-8x7b/T2048/uniform | **missed** |"
        in text
    )
    assert "| 2,000.0 | 1,900.0 | 50 % | 75 % | 88 % | 94 % | 97 % |" in text
    assert "| 19.0 | 2,800 | 4 / 1 | 3.0 | 40 % |" in text
    assert "| 1,000.0 | 1,100.0 | 1.1 |" in text
    assert "RuntimeError: a \\| b |" in text
    assert "Not reached in the time: 2 cases." in text
    widths = {block.count("|") for block in text.splitlines() if block.startswith("| ---")}
    assert len(widths) > 1
    for table in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_only_what_stands_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_between_markers(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert replace_between_markers(replace_between_markers(text, "a"), "b") == replace_between_markers(text, "b")


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        replace_between_markers(text, "new")


def test_results_are_written_under_the_name_of_the_device(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    file = write_results(result([row()]), folder=tmp_path / "results", page=page)
    assert file == tmp_path / "results" / "gpu_h200.json"
    assert json.loads(file.read_text())["rows"][0]["matmul_share"] == 0.82
    assert "mixtral-8x7b" in page.read_text()


def test_a_rehearsal_is_never_written_into_the_results(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(ValueError, match="rehearsal"):
        write_results(result([row()], rehearsal=True), folder=tmp_path, page=page)
    assert [path.name for path in tmp_path.iterdir()] == ["performance.md"]
