"""`moe-jax inspect`, `convert`, `export` and `verify` on golden checkpoints."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.golden_cases import golden_case

from moe_jax.checkpoints import Progress
from moe_jax.cli import main
from moe_jax.cli.progress import byte_progress

CASE = golden_case("qwen3_moe", "renormalized")
SOURCE = str(CASE.folder("per_expert"))
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "out"
    assert main(["convert", SOURCE, str(output)]) == 0
    return str(output)


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "out"
    assert main(["export", converted, str(output)]) == 0
    return str(output)


def run(*arguments, status=0):
    assert main(list(arguments)) == status


def run_json(capsys, *arguments, status=0):
    capsys.readouterr()
    run(*arguments, "--json", status=status)
    return json.loads(capsys.readouterr().out)


def test_inspect_shows_what_the_configuration_and_the_files_say(capsys):
    config = CASE.config("per_expert")
    document = run_json(capsys, "inspect", SOURCE)
    assert document["family"] == "qwen3_moe"
    assert document["kind"] == "huggingface"
    assert document["layers"] == config["num_hidden_layers"]
    assert document["experts_per_token"] == config["num_experts_per_tok"]
    tensors = load_file(f"{SOURCE}/model.safetensors")
    assert document["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert document["dtypes"] == {"float32": document["parameters"]}


def test_inspect_prints_a_table_that_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run("inspect", SOURCE)
    text = capsys.readouterr().out
    assert "qwen3_moe (Qwen3MoeForCausalLM)" in text
    assert "9, of which 3 per token, width 20" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= max(80, len(SOURCE))


def test_inspect_tells_a_converted_folder(converted, capsys):
    assert run_json(capsys, "inspect", converted)["kind"] == "converted"


def test_inspect_lists_tensors_that_are_left_out(capsys):
    case = golden_case("deepseek_v3", next(name for name in _cases_with_dropped_tensors()))
    document = run_json(capsys, "inspect", str(case.folder(case.forms[0])))
    assert set(document["dropped"]) == set(case.dropped_tensors)
    run("inspect", str(case.folder(case.forms[0])))
    text = "".join(capsys.readouterr().out.split())
    assert all(name in text for name in case.dropped_tensors)


def _cases_with_dropped_tensors():
    from support.golden_cases import golden_cases

    return [case.name for case in golden_cases("deepseek_v3") if case.dropped_tensors]


def test_a_checkpoint_that_is_not_whole_is_refused_with_every_problem(tmp_path, capsys):
    folder = shutil.copytree(SOURCE, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = np.zeros(1, np.float32)
    save_file(tensors, folder / "model.safetensors")
    for command in (("inspect", str(folder)), ("convert", str(folder), str(tmp_path / "out"))):
        run(*command, status=2)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "model.norm.weight" in captured.err
        assert "model.extra" in captured.err
    assert not (tmp_path / "out").exists()


def test_convert_reports_and_does_not_replace_without_being_told(tmp_path, capsys):
    output = tmp_path / "out"
    document = run_json(capsys, "convert", SOURCE, str(output), "--dtype", "bfloat16")
    assert document["output"] == str(output)
    assert document["parts_resumed"] == 0
    assert document["dtype_bytes"].keys() == {"bfloat16"}
    run("convert", SOURCE, str(output), status=2)
    assert "--overwrite" in capsys.readouterr().err
    run("convert", SOURCE, str(output), "--overwrite")
    assert str(output) in capsys.readouterr().out
    assert run_json(capsys, "inspect", str(output))["dtypes"].keys() == {"float32"}


def test_an_interrupted_conversion_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_jax.checkpoints.convert", interrupted)
    run("convert", SOURCE, str(tmp_path / "out"), status=130)
    assert "run the same command again to go on" in capsys.readouterr().err


@pytest.mark.parametrize(("done", "says"), [(0, False), (250, True)])
def test_going_on_from_an_interrupted_run_is_said_once(done, says, capsys):
    with byte_progress("converting") as show:
        for finished in (done, 500, 1000):
            show(Progress(done_bytes=finished, total_bytes=1000, label=""))
    assert capsys.readouterr().err == "going on from an interrupted run: 250 B of 1.00 kB are done\n" * says


def test_verify_finds_a_conversion_and_an_export_equal(converted, exported, capsys):
    for output in (converted, exported):
        assert run_json(capsys, "verify", SOURCE, output)["ok"] is True
        run("verify", SOURCE, output)
        assert "every value is the same" in capsys.readouterr().out


def test_export_keeps_the_form_unless_told_otherwise(converted, exported, tmp_path, capsys):
    original, copy = load_file(f"{SOURCE}/model.safetensors"), load_file(f"{exported}/model.safetensors")
    assert original.keys() == copy.keys()
    assert all(np.array_equal(original[name], copy[name]) for name in original)
    document = run_json(capsys, "export", converted, str(tmp_path / "fused"), "--form", "fused")
    assert document["form"] == "fused"
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert fused.keys() == load_file(CASE.folder("fused") / "model.safetensors").keys()


def test_convert_lays_its_output_out_for_as_many_devices_as_asked_for(tmp_path, capsys):
    for number, shards in enumerate(((), ("--shards", "3"))):
        run("convert", SOURCE, str(tmp_path / str(number)), *shards)
    manifests = [json.loads((tmp_path / str(number) / "moe_jax.json").read_text()) for number in range(2)]
    assert [manifest["shards"] for manifest in manifests] == [1, 3]


def test_export_has_the_dtype_that_was_asked_for_and_replaces_only_if_told_to(converted, tmp_path, capsys):
    output = tmp_path / "out"
    run("export", converted, str(output), "--dtype", "bfloat16")
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    capsys.readouterr()
    run("export", converted, str(output), status=2)
    assert "--overwrite" in capsys.readouterr().err
    run("export", converted, str(output), "--overwrite")
    assert {tensor.dtype.name for tensor in load_file(output / "model.safetensors").values()} == {"float32"}


def test_verify_names_what_differs_with_status_1(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, folder / "model.safetensors")
    document = run_json(capsys, "verify", SOURCE, str(folder), status=1)
    assert document["ok"] is False
    (difference,) = document["differences"]
    assert (difference["tensor"], difference["values"]) == ("model.norm.weight", 1)
    assert difference["largest"] == pytest.approx(0.5, abs=1e-6)
    run("verify", SOURCE, str(folder), status=1)
    assert "model.norm.weight" in capsys.readouterr().out


def test_a_setting_that_differs_is_status_1_too(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_topk_prob": not config["norm_topk_prob"]}))
    document = run_json(capsys, "verify", SOURCE, str(folder), status=1)
    assert (document["ok"], document["differences"]) == (False, [])
    (setting,) = document["settings"]
    assert setting.endswith("renormalize: True against False")
    run("verify", SOURCE, str(folder), status=1)
    text = capsys.readouterr().out
    assert "different  1 setting\n" in text
    assert "renormalize" in text


def test_a_difference_of_nan_is_null_in_json(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    (difference,) = run_json(capsys, "verify", SOURCE, str(folder), status=1)["differences"]
    assert difference["largest"] is None


def test_an_infinite_difference_is_null_in_json(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, folder / "model.safetensors")
    (difference,) = run_json(capsys, "verify", SOURCE, str(folder), status=1)["differences"]
    assert difference["largest"] is None
    run("verify", SOURCE, str(folder), status=1)
    assert "inf" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "some/one"),
        ("convert", "some/one", "out"),
        ("export", "some/one", "out"),
        ("verify", "some/one", "out"),
        ("generate", "some/one", "--prompt", "x"),
        ("compile", "some/one", "--target", "h200:1x8"),
    ],
    ids=lambda command: command[0],
)
def test_a_revision_is_asked_of_the_hub(command, tmp_path, capsys, monkeypatch):
    def download(source, *, revision, **options):
        raise FileNotFoundError(f"asked for {source} {revision}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("moe_jax.cli.commands.compile.ENVIRONMENT", {})
    run(*command, "--revision", "v2", status=2)
    assert "asked for some/one v2" in capsys.readouterr().err
    run(*command, status=2)
    assert "asked for some/one None" in capsys.readouterr().err


def test_a_disk_that_refuses_a_write_ends_in_one_message_and_no_traceback(tmp_path):
    small_files = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash"]  # of 1024 bytes each: the embedding does not fit
    child = subprocess.run(
        [
            *small_files,
            sys.executable,
            "-m",
            "moe_jax.cli",
            "convert",
            str(DEMO),
            str(tmp_path / "out"),
            "--dtype=float32",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1, child.stderr
    assert re.match(r"moe-jax convert: .*could not be written: .*File too large", child.stderr)
