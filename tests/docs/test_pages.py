"""The documentation is true: examples run, links lead somewhere, and every file, target and command it names exists."""

import doctest
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for folder in (".", "docs", "examples", "benchmarks") for page in (ROOT / folder).glob("*.md"))
FENCE = re.compile(r"^```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
PATH_IN_BACKTICKS = re.compile(r"`(?P<path>\.?[\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:toml|py|txt|md|ipynb)|[\w-]+/)`")
MAKE_TARGET = re.compile(r"\bmake ([a-z][a-z-]+)\b(?=[`\s])")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, *languages: str) -> list[str]:
    """The code of a page's fenced blocks in these languages."""
    return [block["code"] for block in FENCE.finditer(page.read_text()) if block["language"] in languages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made on code hosts."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings_that_exist(page):
    prose = FENCE.sub("", page.read_text())
    for target in (link["target"] for link in LINK.finditer(prose)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading, only {sorted(anchors(file))}"


@each_page
def test_paths_in_backticks_exist(page):
    elsewhere = ("build/", "parts/", "OUT/", "HF_DIR/", ".venv", "data/")
    placeholders = {"owner/name"}
    for path in (match["path"] for match in PATH_IN_BACKTICKS.finditer(FENCE.sub("", page.read_text()))):
        if path in placeholders or path.startswith(elsewhere):
            continue
        assert any((base / path).exists() for base in (ROOT, page.parent)), f"`{path}` does not exist"


@each_page
def test_make_targets_exist(page):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join([*fences(page, "bash", "console", "sh"), *re.findall(r"`[^`\n]+`", page.read_text())])
    assert set(MAKE_TARGET.findall(code + "\n")) <= known


@each_page
def test_interactive_examples_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "examples", tmp_path / "examples")
    for code in fences(page, "python"):
        compile(code, str(page), "exec")
    session = "\n".join(fences(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, str(page.relative_to(ROOT)), str(page), 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)
