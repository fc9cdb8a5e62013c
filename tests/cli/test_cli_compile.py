"""`moe-jax compile`: arguments, the environment that it sets, what it prints; the compiling itself is part of `make aot`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from support.compiled_programs import GROUPED_QUERY, decoder_of, recorded
from support.xla_flags import xla_flags

from moe_jax.aot import targets
from moe_jax.aot.compile_report import report
from moe_jax.aot.memory import MemoryUse
from moe_jax.aot.model_programs import CompiledProgram, abstract_model
from moe_jax.aot.sizes import Sizes
from moe_jax.cli import main
from moe_jax.cli.commands import compile as command
from moe_jax.cli.commands.compile import ENVIRONMENT
from moe_jax.config import DispatchStrategy
from moe_jax.kernels.fused_moe import IMPLEMENTATION_NAMES

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo_model"


@pytest.fixture(autouse=True)
def _environment_as_it_was(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_choices_are_those_of_the_library():
    assert get_args(DispatchStrategy) == command.STRATEGIES
    assert set(IMPLEMENTATION_NAMES) - {"reference"} == set(command.IMPLEMENTATIONS)


def test_the_environment_is_what_both_compilers_need():
    assert targets.GPU_ENVIRONMENT.items() <= ENVIRONMENT.items()
    assert targets.TPU_ENVIRONMENT.items() <= ENVIRONMENT.items()


@pytest.mark.parametrize("target", ["h200:1x8", "v6e:2x2"])
def test_without_the_compilers_the_extra_is_named(target, capsys, monkeypatch):
    def not_installed(name):
        raise targets.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(targets.metadata, "version", not_installed)
    assert main(["compile", str(DEMO), "--target", target]) == 2
    error = capsys.readouterr().err
    assert "must be installed" in error
    assert "pip install -e '.[aot]'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h300:2x8"], "unknown target 'h300:2x8'"),
        (
            ["--target", "v5e:64x64"],
            "there is no slice 'v5e:64x64': its shape must be chips along each axis, at most 16x16",
        ),
        (
            ["--target", "v6e:2x2", "--implementation", "pallas_gpu"],
            "--implementation pallas_gpu cannot be compiled for v6e:2x2; legal are pallas_tpu and xla",
        ),
        (
            ["--target", "h200:1x8", "--implementation", "pallas_tpu"],
            "--implementation pallas_tpu cannot be compiled for h200:1x8; legal are pallas_gpu and xla",
        ),
        (["--target", "v6e:2x2", "--prompt-length", "64", "--cache-length", "64"], "must exceed prompt_length=64"),
    ],
)
def test_wrong_arguments_are_one_message(arguments, message, capsys):
    assert main(["compile", str(DEMO), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_is_a_folder_or_a_config_alone(capsys, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text(json.dumps({"model_type": "unheard_of"}))
    for source in (tmp_path, alone):
        assert main(["compile", str(source), "--target", "v6e:2x2"]) == 2
        assert "model_type 'unheard_of' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["auto", 16, ["float32"], "float64"])
def test_a_dtype_that_a_model_cannot_have_is_one_message_naming_file_and_key(value, capsys, tmp_path):
    config = json.loads((DEMO / "config.json").read_text()) | {"dtype": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["compile", str(tmp_path), "--target", "h200:1x2"]) == 2
    message = f"{tmp_path / 'config.json'}: dtype must be one of bfloat16, float16, float32; got {value!r}"
    assert message in capsys.readouterr().err


STANDING_IN = """
import sys
import jax
from moe_jax.aot import model_programs, targets

class Topology:
    devices = jax.devices()

targets.GpuTarget.topology = lambda self: Topology
from moe_jax.cli import main
sys.exit(main(["compile", *sys.argv[1:]]))
"""
"""Runs the command with the machine's own devices in place of the target's, for which they compile and plan memory."""


def run(*arguments):
    environment = os.environ | {"XLA_FLAGS": xla_flags(2), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", STANDING_IN, *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_a_model_is_compiled_and_reported_as_one_document(tmp_path):
    config = json.loads((DEMO / "config.json").read_text()) | {"num_hidden_layers": 1, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    common = [str(tmp_path), "--target", "h200:1x2", "--batch", "2", "--prompt-length", "16", "--implementation", "xla"]
    finished = run(*common, "--json")
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    assert document["fits"] is True
    assert document["mesh"] == {"data": 1, "expert": 2, "tensor": 1}
    assert "the smallest tensor axis" in document["mesh_reason"]
    assert document["sizes"] == {"batch_size": 2, "prompt_length": 16, "cache_length": 32}
    assert [program["name"] for program in document["programs"]] == ["prefill", "decode"]
    for program in document["programs"]:
        assert program["needed_bytes"] >= document["parameter_bytes"]
        assert "all-reduce" in {row["kind"] for row in program["collectives"]}
        assert program["roofline"]["seconds"] > 0
    assert "2 devices of h200:1x2 as data=1,expert=2,tensor=1" in finished.stderr


@pytest.fixture
def compiled_with(monkeypatch):
    """Stands in for the compilers: two of this machine's devices are the target's, and a plan of `argument_bytes` is theirs."""

    class Topology:
        devices = jax.devices()[:2]

    def compile_with(*arguments, argument_bytes=3_000_000):
        seen = {}

        def compile_generation(model, target, sizes, on_start):
            seen.update(model=model, sizes=sizes)
            planned = [
                MemoryUse(argument_bytes=size, output_bytes=0, temporary_bytes=0, code_bytes=0)
                for size in (argument_bytes, 5_000_000)
            ]
            return [
                CompiledProgram(name=name, seconds=1.0, memory=plan, refused=None, text=recorded("loops_h200_1x4"))
                for name, plan in zip(("prefill", "decode"), planned, strict=True)
            ]

        monkeypatch.setattr(targets.GpuTarget, "topology", lambda self: Topology)
        monkeypatch.setattr("moe_jax.aot.model_programs.compile_generation", compile_generation)
        status = main(["compile", str(DEMO), "--target", "h200:1x2", *arguments])
        return status, seen["model"], seen["sizes"]

    return compile_with


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_the_status_is_that_of_a_failed_check_if_a_program_does_not_fit(options, compiled_with, capsys):
    assert compiled_with(*options)[0] == 0
    capsys.readouterr()
    assert compiled_with(*options, argument_bytes=10**15)[0] == 1
    output = capsys.readouterr().out
    assert json.loads(output)["fits"] is False if options else "DOES NOT FIT" in output


def test_options_reach_the_model_that_is_compiled(compiled_with):
    _, model, sizes = compiled_with("--prompt-length", "32")
    assert model.dtype.name == json.loads((DEMO / "config.json").read_text())["dtype"]
    assert (sizes.batch_size, sizes.prompt_length, sizes.cache_length) == (8, 32, 64)
    options = ("--dtype", "float16", "--strategy", "ragged_all_to_all", "--implementation", "xla")
    _, model, sizes = compiled_with(*options, "--batch", "4", "--cache-length", "4096", "--mesh", "expert=2")
    mixture = model.stacks[-1].blocks[model.stacks[-1].moe_positions[0]].feed_forward.config
    assert (model.dtype.name, mixture.parallel.strategy, mixture.implementation) == options[1::2]
    assert dict(model.mesh.shape)["expert"] == 2
    assert (sizes.batch_size, sizes.cache_length) == (4, 4096)


def test_each_program_stands_in_its_own_column(compiled_with, capsys):
    compiled_with()
    assert re.search(r"weights, cache and inputs +3.00 MB +5.00 MB", capsys.readouterr().out)


def test_a_report_is_printed_with_both_programs_side_by_side(capsys):
    planned = MemoryUse(argument_bytes=3_000_000, output_bytes=0, temporary_bytes=500_000, code_bytes=0)
    programs = [
        CompiledProgram(name=name, seconds=1.0, memory=planned, refused=None, text=recorded("loops_h200_1x4"))
        for name in ("prefill", "decode")
    ]
    model = abstract_model(decoder_of(GROUPED_QUERY), dtype=jnp.bfloat16)
    sizes = Sizes(batch_size=2, prompt_length=16, cache_length=32)
    result = report(model, targets.target_named("h200:1x4"), sizes, {"data": 1, "expert": 4, "tensor": 1}, programs)
    command.print_report("MODEL", result)
    text = capsys.readouterr().out
    assert "MODEL on h200:1x4" in text
    assert re.search("mesh +as asked for", text)
    assert re.search(r"memory needed +3.50 MB +3.50 MB", text)
    assert re.search(r"all-reduce +bf16\[8,128\] +4 +7 +14.34 kB +1 run +token", text)
    assert "fits" in text
    assert "Nothing was measured" in text
