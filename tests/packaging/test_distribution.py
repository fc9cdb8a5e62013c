"""The wheel and the sdist, built from a copy of the tree and imported from a clean environment in another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE_FOLDERS = {"moe_jax": "moe_jax", "kernels": "moe_jax/kernels", "checkpoints": "moe_jax/checkpoints"}
BUILD_INPUTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", *PACKAGE_FOLDERS)

IMPORT_EVERY_MODULE = """
import importlib, json, pkgutil
import moe_jax
names = ["moe_jax", *(module.name for module in pkgutil.walk_packages(moe_jax.__path__, "moe_jax."))]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names if not name.endswith("__main__")}))
"""


def run(*command: object, cwd: Path) -> str:
    """What the command prints; its whole output is shown if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_modules() -> set[str]:
    """Every Python file of the packages, named as it must be installed."""
    return {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in PACKAGE_FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree)
    return out


@pytest.fixture(scope="module")
def clean_python(distributions, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel; this environment's libraries come after it on the path.

    A folder named in a .pth file doesn't have its own .pth files read, so the editable install is not visible there.
    """
    environment = tmp_path_factory.mktemp("clean") / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (wheel,) = distributions.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = environment / "lib" / version / "site-packages" / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_holds_every_module_under_moe_jax_and_nothing_else(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moe_jax"}
    assert {name for name in names if name.endswith(".py")} == source_modules()
    assert "moe_jax/py.typed" in names


def test_sdist_holds_sources_license_and_readme(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        file.relative_to(ROOT).as_posix() for folder in PACKAGE_FOLDERS for file in (ROOT / folder).rglob("*.py")
    }
    assert sources | {"pyproject.toml", "setup.py", "README.md", "LICENSE", "moe_jax/py.typed"} <= names


def test_every_module_of_the_installed_wheel_imports_from_another_folder(clean_python, tmp_path):
    files = json.loads(run(clean_python, "-c", IMPORT_EVERY_MODULE, cwd=tmp_path))
    installed = clean_python.parents[1]
    assert {"moe_jax.kernels", "moe_jax.checkpoints"} <= files.keys()
    strays = {name: file for name, file in files.items() if not Path(file).is_relative_to(installed)}
    assert not strays


def test_installed_command_line_runs(clean_python, tmp_path):
    assert "inspect" in run(clean_python.parent / "moe-jax", "--help", cwd=tmp_path)


def test_top_level_kernels_and_checkpoints_are_not_installed(clean_python, tmp_path):
    find = "from importlib.util import find_spec; print(find_spec('kernels'), find_spec('checkpoints'))"
    assert run(clean_python, "-c", find, cwd=tmp_path).split() == ["None", "None"]


def test_editable_install_maps_the_top_level_folders(tmp_path):
    show = "import moe_jax.kernels, moe_jax.checkpoints; print(moe_jax.kernels.__file__, moe_jax.checkpoints.__file__)"
    files = run(sys.executable, "-c", show, cwd=tmp_path).split()
    assert files == [str(ROOT / "kernels/__init__.py"), str(ROOT / "checkpoints/__init__.py")]
