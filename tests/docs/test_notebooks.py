"""Every notebook runs from top to bottom, and is committed without outputs, which would grow stale."""

import subprocess
import venv

import nbformat
import pytest
from nbclient import NotebookClient
from support.documentation import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
JAX_THAT_IS_ALREADY_THERE = """
class config:
    update = print
class Device:
    device_kind = "cpu"
__version__ = "0"
devices = lambda *platform: [Device()]
"""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


@pytest.fixture
def cpu_only(monkeypatch):
    """A kernel with one ordinary device, as a visitor has it."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name, marks=[] if path == NOTEBOOKS[0] else pytest.mark.slow) for path in NOTEBOOKS],
)
@pytest.mark.usefixtures("cpu_only")
def test_notebook_runs_and_shows_a_picture(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_notebook_is_committed_without_outputs(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@each_notebook
def test_a_clone_beside_the_notebook_is_installed_although_its_folder_is_called_like_the_package(path, tmp_path):
    cells = nbformat.read(path, as_version=4).cells
    set_up = next(cell.source for cell in cells if "pip" in cell.source)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    beside = tmp_path / "content"
    beside.mkdir()
    (beside / "moe_jax").symlink_to(ROOT)
    (beside / "jax.py").write_text(JAX_THAT_IS_ALREADY_THERE)
    (beside / "pip.py").write_text("import sys; open('installed', 'w').write(sys.argv[-1])")
    subprocess.run([environment / "bin/python", "-c", set_up], cwd=beside, check=True)
    assert (beside / "installed").read_text() == str(beside / "moe_jax")
