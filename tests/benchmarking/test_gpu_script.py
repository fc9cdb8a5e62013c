"""The GPU suite's script in rehearsal: on its own, and with something that fails or hangs in it."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.xla_flags import xla_flags

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
sys.argv[0] = "gpu.py"
import gpu
from moe_jax.benchmarking import gpu_suite
{fault}
sys.exit(gpu.main())
"""


def rehearse(tmp_path, fault, *arguments):
    """The script with these lines executed before its `main`; what it wrote."""
    file = tmp_path / "rehearsal.json"
    script = SCRIPT.format(folder=str(ROOT / "benchmarks"), fault=fault)
    command = [sys.executable, "-c", script, "--rehearse", "--compile-threads", "1", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert file.exists(), done.stdout + done.stderr
    return done, json.loads(file.read_text())


@pytest.mark.slow
def test_the_whole_script_rehearses_from_a_source_tree_in_which_nothing_is_installed(tmp_path):
    """The libraries' folder on the path as such: the file in it that makes the editable install importable isn't read."""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "XLA_FLAGS": xla_flags(1)}
    results = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    file = tmp_path / "rehearsal.json"
    command = ["benchmarks/gpu.py", "--rehearse", "--only", "forward/small/T1/uniform", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / command[0]), *command[1:]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REHEARSAL: these times mean nothing" in done.stdout
    result = json.loads(file.read_text())
    assert result["rehearsal"] is True
    assert {row["contestant"] for row in result["rows"]} >= {"moe_jax xla", "jax.lax.ragged_dot"}
    assert all(row["call_seconds"] > 0 for row in result["rows"])
    assert result["launches"][0]["programs"] == 1
    assert "moe_jax pallas_gpu" in result["unable"]
    assert {path.name for path in (ROOT / "benchmarks" / "results").iterdir()} == results


@pytest.mark.slow
def test_a_device_that_is_lost_costs_neither_what_was_measured_nor_the_exit_status(tmp_path):
    fault = """
def lost(*arguments):
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
original = gpu_suite.Suite._draw_sets
def draw_sets(self, case):
    if self.rows:
        gpu_suite.device_failure = lambda: "CUDA_ERROR_ILLEGAL_ADDRESS"
        lost()
    return original(self, case)
gpu_suite.Suite._draw_sets = draw_sets
gpu.launches = lost
"""
    done, result = rehearse(tmp_path, fault, "--no-rivals", "--only", "forward")
    assert done.returncode == 1, done.stdout + done.stderr
    assert result["rows"][0]["call_seconds"] > 0
    assert "ILLEGAL_ADDRESS" in result["rows"][-1]["failed"]
    assert "ILLEGAL_ADDRESS" in result["failed_steps"]["launches"]
    assert len(result["not_reached"]) == 6
    assert "| launches |" in done.stdout


@pytest.mark.slow
def test_a_torch_process_that_dies_costs_its_own_rows_alone(tmp_path):
    fake = tmp_path / "fake"
    fake.write_text(f"#!{sys.executable}\nimport os\ninput()\nprint('{{}}', flush=True)\nos._exit(3)\n")
    fake.chmod(0o755)
    done, result = rehearse(tmp_path, "", "--torch-python", str(fake), "--only", "forward/small/T1/uniform")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {row["contestant"] for row in result["rows"] if row["failed"]}
    assert failed <= {"torch grouped_mm"}
    assert "code 3" in result["unable"]["torch grouped_mm"]
    assert result["launches"][0]["programs"] == 1


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("print('{not json', flush=True)", "torch cannot be used: "),
        ("raise ImportError('no CUDA')", "ended with code 1"),
    ],
)
def test_a_torch_process_that_makes_no_sense_takes_no_part(says, reason, tmp_path):
    fake = tmp_path / "fake"
    fake.write_text(f"#!{sys.executable}\ninput()\n{says}\n")
    fake.chmod(0o755)
    stubs = """
gpu.smoke_test = lambda *arguments, **options: []
gpu.launches = lambda options: []
gpu.gpu_suite.Suite.run = lambda self, cases: []
"""
    done, result = rehearse(tmp_path, stubs, "--torch-python", str(fake))
    assert done.returncode == 0, done.stdout + done.stderr
    assert reason in result["unable"]["torch grouped_mm"]


def test_a_python_for_torch_that_does_not_exist_costs_the_other_contestants_nothing(tmp_path):
    stubs = "gpu.smoke_test = lambda *arguments, **options: []\ngpu.gpu_suite.Suite.run = lambda self, cases: []"
    done, result = rehearse(tmp_path, stubs, "--torch-python", "/no/such/python")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/no/such/python cannot be started" in result["unable"]["torch grouped_mm"]


HANGS = """
import time
def hang(*arguments, **options):
    while True:
        time.sleep(1)
"""


@pytest.mark.slow
def test_a_case_that_hangs_is_named_and_ends_the_process_with_what_was_measured(tmp_path):
    fault = f"""{HANGS}
original = gpu_suite.Suite._time
def time_second(self, *arguments):
    if len(self.rows) == 1:
        return original(self, *arguments)
    hang()
gpu_suite.Suite._time = time_second
original_add = gpu_suite.Suite._add
def add(self, *arguments):
    gpu_suite.LONGEST_SECONDS = 2 if self.rows else 60
    original_add(self, *arguments)
gpu_suite.Suite._add = add
gpu.launches = lambda options: []
"""
    done, result = rehearse(tmp_path, fault, "--no-rivals", "--only", "forward/small/")
    assert done.returncode == 3, done.stdout + done.stderr
    assert result["rows"][0]["call_seconds"] > 0
    hung = result["rows"][1]
    assert hung["failed"].startswith("not finished")
    assert result["failed_steps"]["ended early"] == f"{hung['case']}, {hung['contestant']}: not done after 2 s"
    assert "ENDED EARLY" in done.stdout
    assert result["not_reached"]


def test_the_run_ends_within_its_minutes_whatever_hangs_and_shows_its_tables(tmp_path):
    done, result = rehearse(tmp_path, f"{HANGS}\ngpu.measure_ceilings = hang", "--minutes", "0.02")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "| ended early |  | the whole run: not done after 1.2 s |" in done.stdout
    assert "the whole run" in result["failed_steps"]["ended early"]
    assert result["rows"] == []


def test_the_smoke_test_alone_times_nothing_and_says_at_once_what_is_wrong(tmp_path):
    fault = """
from moe_jax.benchmarking import gpu_smoke
gpu_smoke._forward_error = lambda *arguments: 0.5
def measure_ceilings(**sizes):
    raise AssertionError("timed")
gpu.measure_ceilings = measure_ceilings
"""
    done, result = rehearse(tmp_path, fault, "--smoke", "--only", "forward")
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(result["failed_steps"]) == {"smoke test, stream", "smoke test, rows"}
    assert done.stdout.startswith("smoke test of stream (xla): wrong: relative error 0.5, 0 s\n")
    assert "timed" not in done.stdout
