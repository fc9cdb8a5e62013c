"""`moe-jax bench gpu-kernels`, with a timer that follows a script."""

import json

import pytest

from moe_jax.benchmarking.device_timer import Timing
from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES
from moe_jax.cli import gpu_kernels, main
from moe_jax.cli.commands.bench import SHAPES
from moe_jax.kernels.device import GPU_DEVICES
from moe_jax.kernels.mosaic_gpu.tuning import read_entries, tuned_tiles

H200 = GPU_DEVICES["h200"]
OPTIONS = ["--shape", "qwen3-30b-a3b", "--tokens", "8192"]


@pytest.fixture
def h200(tmp_path, monkeypatch):
    """An H200 on which the default tiles take 10 µs, and tiles of 64 rows 8 µs."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moe_jax.kernels.device.gpu_device_of", lambda: H200)
    monkeypatch.setattr(gpu_kernels, "_device_events", lambda: True)

    def measure(problem, device, device_events):
        def times(tried):
            fast = [getattr(tiles, "rows", None) == 64 for tiles in tried]
            return [Timing(queued=1e-5, issue=0.0, busy=[8e-6 if is_fast else 10e-6]) for is_fast in fast]

        return times

    monkeypatch.setattr(gpu_kernels, "_measure", measure)


def test_without_a_gpu_the_command_says_what_it_needs(capsys):
    assert main(["bench", "gpu-kernels", "--tune"]) == 2
    assert "needs an NVIDIA GPU of compute capability 9.0 (Hopper) or 10.x" in capsys.readouterr().err


def test_tuning_extends_the_users_table_and_shows_what_was_found(h200, tmp_path, capsys):
    assert main(["bench", "gpu-kernels", *OPTIONS, "--tune", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    entries = read_entries(tmp_path / "cache" / "tuned" / "h200.json", "h200")
    assert [entry.kernel for entry in entries] == ["rows", "rows"]
    assert {entry.tiles.rows for entry in entries} == {64}
    assert len(document["kernels"]) == 2
    assert document["kernels"][0]["entry"]["microseconds"] == pytest.approx(8)
    assert tuned_tiles("rows", entries[0].shape, "h200").tiles == entries[0].tiles


def test_tuning_into_a_file_leaves_the_users_table_alone(h200, tmp_path, capsys):
    file = tmp_path / "h200.json"
    assert main(["bench", "gpu-kernels", *OPTIONS, "--tune", "--into", str(file)]) == 0
    assert len(read_entries(file, "h200")) == 2
    assert not (tmp_path / "cache").exists()
    assert "2 entries written" in capsys.readouterr().out


def test_without_tuning_each_kernel_is_timed_with_its_tiles(h200, tmp_path, capsys):
    assert main(["bench", "gpu-kernels", *OPTIONS, "--backward", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert len(kernels) == 6
    assert all("analytic default" in kernel["why"] for kernel in kernels)
    assert all(kernel["microseconds"] > 0 for kernel in kernels)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "gpt-5"], "unknown --shape gpt-5; legal are mixtral-8x7b"),
        (["--into", "x.json"], "--into says where tuned tiles go: it needs --tune"),
        (["--most-candidates", "3"], "--most-candidates says how many tile sizes are tried: it needs --tune"),
    ],
)
def test_wrong_usage_is_refused(options, message, capsys):
    assert main(["bench", "gpu-kernels", *options]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_shapes_of_the_library(capsys):
    assert tuple(EXPERT_SHAPES) == SHAPES
    with pytest.raises(SystemExit):
        main(["bench", "gpu-kernels", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in EXPERT_SHAPES)
