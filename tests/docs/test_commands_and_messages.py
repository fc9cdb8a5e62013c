"""Command lines in the documentation parse, and the error messages that it explains are ones that the code can give."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documentation import PAGES, ROOT, shell_code

from moe_jax.cli.main import COMMANDS, build_parser

COMMAND_IN_PROSE = re.compile(r"`moe-jax ([a-z]+)")
EXPLAINED_MESSAGE = re.compile(r"^\*\*.*\*\*.*$", re.MULTILINE)
# What stands between values: quotes, numbers, brackets and dots end a fragment.
FRAGMENT = re.compile(r"[A-Za-z_][A-Za-z_ ,;:()-]{9,}")
JOINED_STRINGS = re.compile(r"[\"']\s*\n\s*f?[\"']")
BETWEEN_COMMANDS = {"|", "&&", ">", "<"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page; in a pipe, of each of its commands."""
    for line in shell_code(page).splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "|"]:
            if word in BETWEEN_COMMANDS:
                yield command
                command = []
            else:
                command.append(word)


@each_page
def test_command_lines_parse(page):
    for words in commands(page):
        if words[:1] == ["moe-jax"]:
            build_parser().parse_args(words[1:])


@each_page
def test_scripts_exist_and_know_the_options_that_they_are_given(page):
    options_of_several = (ROOT / "tests/aot/tpu_options.py").read_text()
    for words in commands(page):
        if len(words) < 2 or not words[0].endswith("python") or not words[1].endswith(".py"):
            continue
        source = (ROOT / words[1]).read_text() + options_of_several
        unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]
        assert not unknown, f"{words[1]} has no {unknown}"


@each_page
def test_variables_that_make_is_given_are_read_by_the_makefile(page):
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if words[:1] == ["make"]:
            variables = [word.partition("=")[0] for word in words if "=" in word]
            unknown = [name for name in variables if not re.search(rf"\$(\(|\$\{{){name}\b", makefile)]
            assert not unknown, f"the Makefile does not read {unknown}"


@each_page
def test_commands_named_in_prose_exist(page):
    assert set(COMMAND_IN_PROSE.findall(page.read_text())) <= COMMANDS.keys()


def test_messages_that_are_explained_are_in_the_sources():
    files = [file for folder in ("moe_jax", "kernels", "checkpoints") for file in (ROOT / folder).rglob("*.py")]
    sources = "\n".join(JOINED_STRINGS.sub("", file.read_text()) for file in [*files, ROOT / "scripts/find-python"])
    explained = EXPLAINED_MESSAGE.findall((ROOT / "docs/troubleshooting.md").read_text())
    messages = [message for line in explained for message in re.findall(r"`([^`]+)`", line)]
    assert len(messages) >= 10
    missing = {
        fragment
        for message in messages
        for fragment in (match.strip(" ,;:()") for match in FRAGMENT.findall(message))
        if fragment not in sources
    }
    assert not missing
