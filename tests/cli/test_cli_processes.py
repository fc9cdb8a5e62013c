"""`moe-jax generate` on a mesh and as several processes."""

from functools import partial
from pathlib import Path

import jax
import pytest
from support import processes

from moe_jax import parallel
from moe_jax.cli import main
from moe_jax.cli.processes import mesh_sizes

DEMO_MODEL = str(Path(__file__).parents[2] / "examples/demo_model")
GENERATE = [DEMO_MODEL, "--prompt", "At dawn the crew", "--max-new-tokens", "8", "--dtype", "float32"]

MANUAL = ["--mesh", "expert=2", "--distributed", "--coordinator", "host0:1234"]


def test_a_mesh_is_written_as_axes_and_sizes():
    assert list(mesh_sizes("data=2,expert=4").items()) == [("data", 2), ("expert", 4)]


@pytest.mark.parametrize(
    "text", ["", "expert", "expert=", "expert=0", "expert=x", "model=2", "expert=2,expert=2", "expert=-1"]
)
def test_what_is_no_mesh_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", *GENERATE, "--mesh", text])
    assert "argument --mesh: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distributed"], "--distributed needs --mesh"),
        (["--mesh", "expert=2", "--process-id", "0"], "need --distributed"),
        (
            ["--mesh", "expert=2", "--distributed", "--num-processes", "2"],
            "go together; missing: --coordinator, --process-id",
        ),
        (
            [*MANUAL, "--num-processes", "2", "--process-id", "2"],
            "--process-id must be from 0 to 1, because --num-processes is 2",
        ),
        (
            [*MANUAL, "--num-processes", "2", "--process-id", "-1"],
            "must be from 0 to 1, because --num-processes is 2; got -1",
        ),
        (["--mesh", "expert=16"], "the mesh expert=16 needs 16 devices, got 8"),
        (["--mesh", "expert=2", "--distributed", "--prompt", "-"], "--distributed needs --prompt TEXT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_refused(arguments, message, capsys):
    assert main(["generate", *GENERATE, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_cluster_the_options_that_take_its_place_are_named(capsys, monkeypatch):
    def not_found(*given, **timeouts):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", not_found)
    assert main(["generate", *GENERATE, "--mesh", "expert=2", "--distributed"]) == 2
    assert "a TPU pod): give --coordinator, --num-processes, --process-id\n" in capsys.readouterr().err


def test_a_first_process_that_cannot_be_reached_is_one_message_after_one_that_says_so_at_once(capsys, monkeypatch):
    address = f"localhost:{processes.free_port()}"
    monkeypatch.setattr(
        parallel, "initialize_distributed", partial(parallel.initialize_distributed, initialization_timeout_seconds=1)
    )
    job = ["--mesh", "expert=2", "--distributed", "--coordinator", address, "--num-processes", "2", "--process-id", "1"]
    assert main(["generate", *GENERATE, *job]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"waiting for process 0 at {address} (")
    assert second.startswith(f"moe-jax generate: process 0 cannot be reached at {address} (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", "0", "--process-id", "0"], "argument --num-processes: must be at least 1, got 0"),
        (["--process-id", "first"], "argument --process-id: must be a whole number, got 'first'"),
        (["--coordinator", "host0"], "argument --coordinator: must be like host0:1234, got 'host0'"),
        (["--coordinator", "host0:65536"], "argument --coordinator: must be like host0:1234, got 'host0:65536'"),
    ],
    ids=" ".join,
)
def test_what_says_nothing_about_a_process_is_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", *GENERATE, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_of_two_processes_prints_what_a_single_one_prints(tmp_path, capsys):
    job = ["--mesh", "expert=2,tensor=2", "--distributed", "--num-processes", "{count}", "--process-id", "{number}"]
    command = ["-m", "moe_jax.cli", "generate", *GENERATE, *job, "--coordinator", "{coordinator}"]
    first, second = processes.run(command, count=2, devices=2, folder=tmp_path, timeout=300)
    assert main(["generate", *GENERATE]) == 0
    assert first == capsys.readouterr().out
    assert second == ""


@pytest.mark.slow
def test_processes_with_different_seeds_are_told_so(tmp_path):
    job = ["--mesh", "expert=2", "--distributed", "--num-processes", "{count}", "--process-id", "{number}"]
    command = ["-m", "moe_jax.cli", "generate", *GENERATE, *job, "--coordinator", "{coordinator}", "--seed", "{number}"]
    with processes.started(command, count=2, devices=1, folder=tmp_path) as running:
        assert [process.wait(120) for process in running] == [2, 2]
    for number in range(2):
        assert "those of process 1 differ from those of process 0" in (tmp_path / f"err.{number}").read_text()
