"""Parse the command line, run the command, and turn what goes wrong into one message and an exit status.

Only what parsing needs is imported here, so that `moe-jax --help` answers at once; commands import the rest when they
run.
"""

import argparse
import io
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

from moe_jax.cli import exit_codes
from moe_jax.cli.commands import bench, compile, convert, export, generate, inspect, verify  # noqa: A004
from moe_jax.cli.interrupts import interrupts_not_lost


class Command(Protocol):
    """What a module of `moe_jax.cli.commands` provides."""

    @property
    def SUMMARY(self) -> str:  # noqa: N802 - a constant of the module
        """One line for `moe-jax --help`."""
        ...

    @property
    def DESCRIPTION(self) -> str:  # noqa: N802
        """What the command does, for its own help."""
        ...

    @property
    def EXAMPLES(self) -> str:  # noqa: N802
        """Commands to copy, for its own help."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit status."""
        ...


COMMANDS: dict[str, Command] = {
    "inspect": inspect,
    "convert": convert,
    "export": export,
    "verify": verify,
    "generate": generate,
    "compile": compile,
    "bench": bench,
}

DESCRIPTION = "Mixture-of-Experts checkpoints of Hugging Face in JAX: look at them, convert them, run them."

BAD_INPUT_ERRORS = (OSError, ValueError, NotImplementedError)
"""What unusable files and arguments raise; anything else is a defect of the program and shows its traceback."""

OUT_OF_MEMORY = (
    "out of memory; smaller --batch, shorter prompts and fewer new tokens need less, --dtype bfloat16 halves float32, "
    "and --mesh spreads a model over several devices"
)
"""What a user can do about it. Not every command has every option, but the one that runs models does."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="moe-jax",
        description=DESCRIPTION,
        epilog=exit_codes.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=PrintVersion, help="show the version and exit")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=wrapped(command.DESCRIPTION),
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run, parser=subparser)
    return parser


def wrapped(text: str) -> str:
    """`text` with each of its paragraphs filled to the width of the terminal."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(textwrap.fill(paragraph, width) for paragraph in text.split("\n\n"))


class PrintVersion(argparse.Action):
    """`--version`; looks the version up only when asked, because that reads the installed packages."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        del dest  # nothing is stored
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and exit."""
        from importlib.metadata import version

        print(f"moe-jax {version('moe-jax')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-jax` with these arguments (default: those of the process); returns the exit status.

    Raises:
        SystemExit: the arguments are wrong (status 2), or help was asked for (status 0).
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not end the command
            stream.reconfigure(errors="replace")
    try:
        with interrupts_not_lost():
            arguments, unknown = build_parser().parse_known_args(argv)
            if unknown:
                arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            status = run_command(arguments)
            sys.stdout.flush()
    except KeyboardInterrupt:  # while arguments are parsed
        return interrupted("moe-jax")
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    return status


def open_closed_streams() -> None:
    """Give the standard streams that were closed when the process started, which are None, to `os.devnull`.

    In their order, so that each takes its own number, and no file of the command becomes what libraries write to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - stays open until the process ends


def run_command(arguments: argparse.Namespace) -> int:
    """Run the command that was asked for; what a user can cause ends in a message on standard error.

    A traceback is printed here, not left to Python, which would end with the status of a failed check.
    """
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return interrupted(f"moe-jax {arguments.command}")
    except BrokenPipeError:
        raise
    except BAD_INPUT_ERRORS as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"moe-jax {arguments.command}: {describe(error)}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except Exception as error:  # noqa: BLE001 - whatever a defect raises
        out_of_memory = is_out_of_memory(error)
        if arguments.debug or not out_of_memory:
            traceback.print_exc()
        else:
            print(f"moe-jax {arguments.command}: {OUT_OF_MEMORY}\n{first_line(error)}", file=sys.stderr)
        return exit_codes.BAD_INPUT if out_of_memory else exit_codes.DEFECT


def interrupted(what: str) -> int:
    """Say so on standard error; returns the exit status."""
    print(f"\n{what}: interrupted", file=sys.stderr)
    return exit_codes.INTERRUPTED


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is the runtime's way to say that a device, or the host, has no room; jax need not be imported for it."""
    if isinstance(error, MemoryError):
        return True
    is_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return is_jax and any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def first_line(error: Exception) -> str:
    """The first line of an error's message; what follows is a table of buffers."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def describe(error: Exception) -> str:
    """The message of an error, without the number that the operating system puts in front."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
