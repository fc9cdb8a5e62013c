"""`scripts/find-python` prints the newest interpreter that will do, wherever it is, or says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/find-python"


@pytest.fixture
def machine(tmp_path):
    """A machine with the shell's own tools and no Python: a folder on the path for commands, and a home."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "env", "head", "ls", "seq", "sort"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (commands / tool).symlink_to(found)
    return tmp_path


def put(path: Path, version: str, *, has_venv: bool = True) -> None:
    """A Python of that version: it runs the script's probe in this one, with the version changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = "" if has_venv else "sys.modules['venv'] = None; "
    pretend = f"sys.version_info = type('Version', (tuple,), dict())(({version.replace('.', ', ')}, 'final', 0)); "
    path.write_text(
        f"""#!/usr/bin/env bash
shift
exec {sys.executable} -c "import sys; sys.executable = '{path}'; {pretend}{missing}$1" "${{@:2}}"
"""
    )
    path.chmod(0o755)


def find(machine: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine), "PYENV_ROOT": str(machine / ".pyenv")}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_newest_of_all_that_are_found_is_taken(machine):
    put(machine / "bin/python3", "3.12.1")
    put(machine / ".pyenv/versions/3.13.2/bin/python", "3.13.2")
    put(machine / ".pyenv/versions/3.13.10/bin/python", "3.13.10")
    assert find(machine).stdout.strip() == str(machine / ".pyenv/versions/3.13.10/bin/python")


@pytest.mark.parametrize("version", ["3.11.9", "3.15.0"])
def test_versions_outside_of_the_range_are_passed_over(machine, version):
    put(machine / "bin/python3", version)
    put(machine / "bin/python3.12", "3.12.0")
    assert find(machine).stdout.strip() == str(machine / "bin/python3.12")


def test_another_range_may_be_asked_for(machine):
    put(machine / "bin/python3.11", "3.11.9")
    put(machine / "bin/python3.13", "3.13.0")
    assert find(machine, "3.11", "3.11").stdout.strip() == str(machine / "bin/python3.11")


def test_an_interpreter_without_venv_or_one_that_does_not_run_is_passed_over(machine):
    put(machine / "bin/python3.14", "3.14.0", has_venv=False)
    put(machine / "bin/python3.13", "3.13.0")
    (machine / "bin/python3.13").write_text("#!/usr/bin/env bash\nexit 127\n")
    put(machine / "bin/python3.12", "3.12.0")
    assert find(machine).stdout.strip() == str(machine / "bin/python3.12")


def test_without_any_it_says_what_to_install(machine):
    done = find(machine)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "needs Python 3.12 (up to 3.14) with its venv module" in done.stderr
