"""Command lines in the documentation parse, and the error messages that it explains are ones that the code can give."""

import re
import shlex
from pathlib import Path

import pytest

from moe_jax.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for folder in (".", "docs", "examples", "benchmarks") for page in (ROOT / folder).glob("*.md"))
BASH = re.compile(r"^```bash\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND_IN_PROSE = re.compile(r"`moe-jax ([a-z]+)")
EXPLAINED_MESSAGE = re.compile(r"^\*\*.*\*\*.*$", re.MULTILINE)
# What stands between values: quotes, numbers, brackets and dots end a fragment.
FRAGMENT = re.compile(r"[A-Za-z_][A-Za-z_ ,;:()-]{9,}")
JOINED_STRINGS = re.compile(r"[\"']\s*\n\s*f?[\"']")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_command_lines_parse(page):
    code = "\n".join(block["code"] for block in BASH.finditer(page.read_text()))
    lines = code.replace("\\\n", " ").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["moe-jax"]:
            build_parser().parse_args(words[1:])


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
