"""The documentation is true: examples run, links lead somewhere, and every file, target and command it names exists."""

import doctest
import os
import re
from pathlib import Path

import pytest
from support.documentation import FENCE, PAGES, ROOT, fences, prose, shell_code

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
PATH_IN_BACKTICKS = re.compile(r"`(?P<path>\.?[\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:toml|py|txt|md|ipynb)|[\w-]+/)`")
MAKE_TARGET = re.compile(r"\bmake ([a-z][a-z-]+)\b(?=[`\s])")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made on code hosts."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in (link["target"] for link in LINK.finditer(prose(page))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading, only {sorted(anchors(file))}"


def test_the_index_has_every_page_and_every_notebook():
    listed = {link["target"] for link in LINK.finditer((ROOT / "docs/index.md").read_text())}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages | {f"../notebooks/{notebook.name}" for notebook in NOTEBOOKS} <= listed


@each_page
def test_paths_in_backticks_exist(page):
    elsewhere = ("build/", "parts/", "OUT/", "HF_DIR/", ".venv", "data/")
    placeholders = {"owner/name", "Qwen/Qwen3-30B-A3B"}
    for path in (match["path"] for match in PATH_IN_BACKTICKS.finditer(prose(page))):
        if path in placeholders or path.startswith(elsewhere):
            continue
        assert any((base / path).exists() for base in (ROOT, page.parent)), f"`{path}` does not exist"


@each_page
def test_make_targets_exist(page):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join([shell_code(page), *re.findall(r"`[^`\n]+`", page.read_text())])
    assert set(MAKE_TARGET.findall(code + "\n")) <= known


@each_page
def test_each_block_of_code_is_in_a_language_that_the_tests_look_at_or_that_is_no_code(page):
    languages = {block["language"] for block in FENCE.finditer(page.read_text())}
    assert languages <= {"bash", "pycon", "python", "yaml"} | {"mermaid", "text", ""}


@each_page
def test_examples_run_and_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "examples", tmp_path / "examples")
    session = "\n".join(fences(page, "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, str(page.relative_to(ROOT)), str(page), 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    if not Path("converted").exists():
        os.symlink(ROOT / "examples/demo_model", "converted")
    for code in fences(page, "python"):
        program = compile(code, str(page), "exec")
        if "initialize_distributed()" not in code:  # tests/processes runs several processes
            exec(program, test.globs)
