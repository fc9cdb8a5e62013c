"""What every command has in common: help, errors, exit statuses, and who reads the output."""

import gc
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from support.golden_cases import golden_cases

import moe_jax
from moe_jax.cli import exit_codes, main
from moe_jax.cli.main import COMMANDS

DEMO = str(Path(__file__).parents[2] / "examples" / "demo_model")


def run_usage(*arguments):
    """The exit status of a command line that argparse ends."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def test_help_lists_every_command(capsys):
    assert run_usage("--help") == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(command.SUMMARY)}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples_that_parse(command, capsys):
    assert run_usage(command, "--help") == 0
    text = capsys.readouterr().out
    examples = text[text.index("examples:") :]
    assert f"moe-jax {command}" in examples
    from moe_jax.cli.main import build_parser

    for line in examples.splitlines()[1:]:
        words = re.findall(r'"[^"]*"|\S+', line.split("moe-jax ", 1)[1].split(" > ")[0].split(" < ")[0])
        assert build_parser().parse_args([word.strip('"') for word in words]).command == command


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        run_usage(command, "--help")
        before_examples = capsys.readouterr().out.split("examples:")[0]
        assert max(map(len, before_examples.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("inspect",), ("convert", "only-source"), ("generate", "m", "--top-k", "0"), ("bench",)],
    ids=str,
)
def test_wrong_usage_is_status_2(arguments, capsys):
    assert run_usage(*arguments) == 2
    assert "usage: moe-jax" in capsys.readouterr().err


def test_an_unknown_option_is_reported_with_the_usage_of_its_command(capsys):
    assert run_usage("inspect", "m", "--unknown") == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: moe-jax inspect")
    assert error.endswith("moe-jax inspect: error: unrecognized arguments: --unknown\n")


def test_the_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    assert run_usage("--version") == 0
    assert capsys.readouterr().out == f"moe-jax {version('moe-jax')}\n"
    assert moe_jax.__version__ == version("moe-jax")


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "absent"),
        ("convert", "absent", "out"),
        ("export", "absent", "out"),
        ("verify", "absent", "out"),
        ("generate", "absent", "--prompt", "x"),
        ("bench", "generate", "absent"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_checkpoint_that_does_not_exist_is_one_message_and_status_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"moe-jax {arguments[0]}: absent")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback_and_keeps_the_status(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "absent"), "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "absent: does not exist" in error


def test_an_interrupt_is_status_130(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["inspect"], "run", interrupted)
    assert main(["inspect", "anything"]) == 130
    assert capsys.readouterr().err == "\nmoe-jax inspect: interrupted\n"


def test_an_interrupt_while_arguments_are_parsed_is_status_130(capsys, monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_jax.parallel.distributed.parse_address", interrupted)
    assert main(["generate", "anything", "--coordinator", "host0:1234"]) == 130
    assert capsys.readouterr().err == "\nmoe-jax: interrupted\n"


@pytest.fixture
def as_in_a_terminal():
    """Ctrl-C interrupts: what starts tests in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_in_a_terminal")
def test_an_interrupt_that_arrives_in_a_callback_of_the_garbage_collector_ends_the_command_too(capsys, monkeypatch):
    def collect(phase, info):
        callbacks.remove(collect)
        raise KeyboardInterrupt

    def run(arguments):
        callbacks.append(collect)
        gc.collect()
        time.sleep(60)

    callbacks = gc.callbacks
    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    assert main(["inspect", "anything"]) == 130
    assert capsys.readouterr().err == "\nmoe-jax inspect: interrupted\n"


@pytest.mark.usefixtures("as_in_a_terminal")
def test_an_interrupt_waits_until_what_is_being_imported_is_whole(capsys, monkeypatch, tmp_path):
    module = "import signal\nsignal.raise_signal(signal.SIGINT)\nsignal.raise_signal(signal.SIGINT)\nis_whole = True\n"
    (tmp_path / "interrupted_module.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)

    def run(arguments):
        importlib.import_module("interrupted_module")
        time.sleep(60)

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    assert main(["inspect", "anything"]) == 130
    assert capsys.readouterr().err == "\nmoe-jax inspect: interrupted\n"
    assert sys.modules.pop("interrupted_module").is_whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_the_command_line_is_imported_is_status_130():
    program = (
        "import argparse, builtins, sys\nimported = builtins.__import__\n"
        "def interrupted(name, *others):\n"
        "    if name == 'moe_jax.cli.commands':\n        raise KeyboardInterrupt\n    return imported(name, *others)\n"
        "builtins.__import__ = interrupted\nimport moe_jax.cli\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (130, "\nmoe-jax: interrupted\n")


@pytest.mark.parametrize(
    ("closed", "arguments", "status"),
    [
        ("<&-", ("generate", DEMO), 2),
        (">&-", ("inspect", DEMO), 0),
        ("2>&-", ("inspect", "absent"), 2),
        ("<&- >&- 2>&-", ("inspect", DEMO, "--json"), 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_closed_standard_stream_is_no_defect(closed, arguments, status):
    command = shlex.join([sys.executable, "-m", "moe_jax.cli", *arguments])
    finished = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True, check=False)
    assert finished.returncode == status, finished.stderr
    assert finished.stderr == (
        "moe-jax generate: there is no prompt: standard input is empty\n" if closed == "<&-" else ""
    )


def test_a_defect_of_the_program_shows_its_traceback_with_a_status_that_no_check_has(monkeypatch, capsys):
    def defective(arguments):
        raise ZeroDivisionError("by me")

    monkeypatch.setattr(COMMANDS["inspect"], "run", defective)
    assert main(["inspect", "anything"]) == 70
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("ZeroDivisionError: by me\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nbuffers:\n1 2 3"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"),
        jax.errors.JaxRuntimeError("INTERNAL: Out of memory while trying to allocate 99 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ],
    ids=repr,
)
def test_too_little_memory_is_no_defect_but_a_message_that_says_what_to_reduce(error, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setattr(COMMANDS["generate"], "run", run)
    assert main(["generate", "anything"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("moe-jax generate: out of memory; smaller --batch, ")
    assert message.count("\n") == 2
    assert main(["generate", "anything", "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("error", [OSError, ValueError, NotImplementedError])
def test_what_cannot_be_done_with_the_input_is_a_message_on_stderr_alone(error, monkeypatch, capsys):
    """NotImplementedError is what a dispatch strategy or an implementation raises that cannot run what was asked for."""

    def run(arguments):
        raise error("not like this")

    monkeypatch.setattr(COMMANDS["inspect"], "run", run)
    assert main(["inspect", "anything"]) == 2
    assert capsys.readouterr() == ("", "moe-jax inspect: not like this\n")


def test_another_error_of_the_runtime_is_a_defect(monkeypatch, capsys):
    def run(arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(COMMANDS["generate"], "run", run)
    assert main(["generate", "anything"]) == 70
    assert capsys.readouterr().err.startswith("Traceback")


def test_help_explains_every_exit_status(capsys):
    statuses = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    run_usage("--help")
    explained = capsys.readouterr().out.split("exit status:")[1]
    assert {int(number) for number in re.findall(r"^  (\d+) ", explained, re.MULTILINE)} == statuses


def test_help_needs_none_of_the_slow_packages():
    program = (
        "import sys\nfrom moe_jax.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "slow = {'jax', 'flax', 'numpy', 'orbax', 'rich', 'tokenizers', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(', '.join(slow) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_goes_away_ends_the_command_quietly(options):
    """As in `moe-jax inspect ... | true`: the pipe is closed before anything is written; JSON is, when the command ends."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-m",
        "moe_jax.cli",
        "inspect",
        str(golden_cases("mixtral")[0].folder("fused")),
        *options,
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # as a shell has it, whatever runs the tests
    finished = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (141, "")
