"""The pages of the documentation, and the code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for folder in (".", "docs", "examples", "benchmarks", "tests/golden") for page in (ROOT / folder).glob("*.md")
)
FENCE = re.compile(r"^```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(?P<line>.*)$", re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def fences(page: Path, *languages: str) -> list[str]:
    """The code of a page's fenced blocks in these languages."""
    return [block["code"] for block in FENCE.finditer(page.read_text()) if block["language"] in languages]


def shell_code(page: Path) -> str:
    """A page's shell commands, fenced or indented, each on one line."""
    code = "\n".join([*fences(page, "bash"), *(match["line"] for match in INDENTED.finditer(prose(page)))])
    return code.replace("\\\n", " ")
