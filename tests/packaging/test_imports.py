"""What may import what: read from the sources, so that an import inside a function counts too."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY_FOLDERS = ("moe_jax", "kernels", "checkpoints")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHON_FOLDERS = (*LIBRARY_FOLDERS, "benchmarks", "examples", "tests")

# Who may import whom inside the project; a part may always import itself. Dependencies point one way.
ALLOWED = {
    "kernels": set(),
    "json_files": set(),
    "json_types": set(),
    "device_layouts": set(),
    "config_checks": set(),
    "config": {"config_checks", "kernels"},
    "families": {"config", "json_types", "kernels"},
    "placement": {"config"},
    "routing": {"config", "kernels"},
    "experts": {"config", "kernels", "placement"},
    "parallel": {"config", "kernels", "experts"},
    "runner": {"config", "kernels", "routing", "experts", "placement", "parallel"},
    "models": {"config", "device_layouts", "kernels", "families", "experts", "parallel", "runner"},
    "load_balancing": {
        "config",
        "config_checks",
        "device_layouts",
        "experts",
        "kernels",
        "placement",
        "parallel",
        "models",
        "runner",
    },
    "checkpoints": {"config", "kernels", "families", "json_files", "json_types"},
    "assembly": {"device_layouts"},
    "pretrained": {
        "assembly",
        "checkpoints",
        "config",
        "device_layouts",
        "experts",
        "families",
        "models",
        "parallel",
        "runner",
    },
    "generation": {"config_checks", "device_layouts", "json_files", "json_types"},
    "chat_template": set(),
    "tokenization": {"chat_template", "json_files"},
    "aot": {"config", "kernels", "families", "parallel", "models", "generation"},
    "benchmarking": {"checkpoints", "config", "families", "generation", "kernels", "runner"},
    "cli": {
        "aot",
        "benchmarking",
        "checkpoints",
        "config",
        "generation",
        "json_files",
        "kernels",
        "parallel",
        "pretrained",
        "tokenization",
    },
}


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    """The name under which a source file is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "moe_jax" else ("moe_jax", *parts))


def imported_modules(file: Path, *, at_run_time: bool = False) -> set[str]:
    """Full names of all modules that a file imports; `at_run_time` leaves out those under `if TYPE_CHECKING`."""
    tree = ast.parse(file.read_text(), file.name)
    hidden = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            hidden |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    modules = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            modules |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return modules


def part_of(module: str) -> str | None:
    """The part of the project that a module belongs to: `moe_jax.kernels.fused_moe` → `kernels`."""
    names = module.split(".")
    return names[1] if names[0] == "moe_jax" and len(names) > 1 else None


def importers(forbidden: set[str], *folders: str) -> list[str]:
    """The files that import one of these top-level modules."""
    return [
        str(file.relative_to(ROOT))
        for file in python_files(*folders)
        if forbidden & {module.split(".")[0] for module in imported_modules(file)}
    ]


def test_mapped_folders_are_never_imported_by_their_top_level_names():
    assert importers({"kernels", "checkpoints"}, *PYTHON_FOLDERS) == []


def test_the_library_imports_neither_torch_nor_pickle():
    assert importers({"torch", "transformers", "pickle"}, *LIBRARY_FOLDERS) == []


def test_the_table_has_every_part():
    assert {part_of(module_name(file)) for file in python_files(*LIBRARY_FOLDERS)} - {None} == ALLOWED.keys()


@pytest.mark.parametrize("part", ALLOWED)
def test_dependencies_point_one_way(part):
    parts = {part_of(module_name(file)) for file in python_files(*LIBRARY_FOLDERS)} - {None}
    files = [file for file in python_files(*LIBRARY_FOLDERS) if part_of(module_name(file)) == part]
    assert files, f"no source file belongs to {part}"
    for file in files:
        imported = {part_of(module) for module in imported_modules(file, at_run_time=True)} & parts
        assert imported <= ALLOWED[part] | {part}, (
            f"{file.relative_to(ROOT)} imports {imported - ALLOWED[part] - {part}}"
        )


@pytest.mark.parametrize(
    "code",
    [
        "import moe_jax",
        "import moe_jax; [getattr(moe_jax, name) for name in ('MoEConfig', 'MoERunner', 'ExpertMapManager')]",
        "import moe_jax.kernels",
    ],
)
def test_importing_the_layer_loads_no_library_of_the_converter_or_the_command_line(code, tmp_path):
    script = f"""
import sys, jax, flax.nnx
before = set(sys.modules)
{code}
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    heavy = {"orbax", "tensorstore", "matplotlib", "rich", "tokenizers", "huggingface_hub", "safetensors", "jinja2"}
    assert "moe_jax" in loaded.stdout.split()
    assert not heavy & set(loaded.stdout.split())


def test_every_public_name_exists_and_is_listed(tmp_path):
    script = (
        "import moe_jax; missing = [n for n in moe_jax.__all__ if getattr(moe_jax, n, None) is None]; print(missing)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def distributions_imported_by(*folders: str) -> set[str]:
    """The libraries that a folder's files import, by the names under which they are installed."""
    own = {
        path.stem for folder in folders for path in (ROOT / folder).rglob("*") if path.is_dir() or path.suffix == ".py"
    }
    modules = {module.split(".")[0] for file in python_files(*folders) for module in imported_modules(file)}
    renamed = {"orbax": "orbax-checkpoint", "yaml": "pyyaml"}
    imported = modules - sys.stdlib_module_names - own - {"moe_jax", ""}
    return {renamed.get(module, module.replace("_", "-")) for module in imported}


def declared(*requirements: str) -> set[str]:
    """The distributions that requirements name, without their versions."""
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_the_diagram_of_the_architecture_leads_to_each_part_from_all_that_it_may_import():
    diagram = re.search(r"```mermaid\nflowchart BT\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert diagram is not None
    used_by: dict[str, set[str]] = {}
    for line in diagram[1].splitlines():
        used, users = (side.strip().split(" & ") for side in line.split("-->"))
        for user in users:
            used_by.setdefault(user, set()).update(used)
    assert used_by.keys() | set().union(*used_by.values()) >= ALLOWED.keys()

    def all_used(part: str) -> set[str]:
        direct = used_by.get(part, set())
        return direct.union(*map(all_used, direct))

    for part, allowed in ALLOWED.items():
        assert allowed <= all_used(part), f"no arrows lead from {allowed - all_used(part)} to {part}"
        assert used_by.get(part, set()) <= allowed, f"{part} may not import {used_by[part] - allowed}"


def test_the_library_imports_exactly_what_it_declares_as_dependencies():
    assert distributions_imported_by(*LIBRARY_FOLDERS) == declared(*PROJECT["dependencies"])


def test_what_the_tests_import_is_declared():
    of_other_environments = {"torch", "transformers"}
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    imported = distributions_imported_by("tests", "benchmarks", "examples")
    assert imported - of_other_environments <= declared(*requirements)
