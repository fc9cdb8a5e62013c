"""What type checkers tell users of the package, which ships `py.typed`: a call's results by its arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CALLS_OF_A_LAYER = """
from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import MoEConfig, MoERunner, MoERunnerInterface
from moe_jax.runner import MoEAux

layer = MoERunner(MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2, top_k=1), rngs=nnx.Rngs(0))
x = jnp.ones((3, 4))
assert_type(layer(x), jax.Array)
assert_type(layer(x, token_mask=None, with_aux=True), tuple[jax.Array, MoEAux])


def of_any_kind(layer: MoERunnerInterface, with_aux: bool) -> None:
    assert_type(layer(x), jax.Array)
    assert_type(layer(x, with_aux=with_aux), jax.Array | tuple[jax.Array, MoEAux])
"""

CALLS_OF_A_MODEL = """
from typing import assert_type

import jax
import jax.numpy as jnp

from moe_jax import from_pretrained
from moe_jax.models import KVCache
from moe_jax.runner import MoEAux

model = from_pretrained("folder")
ids, cache = jnp.zeros((1, 2), jnp.int32), model.init_cache(1, 8)
assert_type(model(ids), jax.Array)
assert_type(model(ids, attention_mask=ids, with_aux=False), jax.Array)
assert_type(model(ids, forced_ids=None, with_aux=True), tuple[jax.Array, MoEAux])
assert_type(model(ids, cache=cache), tuple[jax.Array, KVCache])
assert_type(model(ids, cache=cache, positions=ids, with_aux=True), tuple[jax.Array, KVCache, MoEAux])


def unknown_until_it_runs(cache: KVCache | None, with_aux: bool) -> None:
    model(ids, cache=cache, with_aux=with_aux)
"""

WRONG_CALLS_OF_A_MODEL = """
import jax.numpy as jnp

from moe_jax import from_pretrained

model = from_pretrained("folder")
ids = jnp.zeros((1, 2), jnp.int32)
model(ids, mask=ids)
logits, cache = model(ids, cache=model.init_cache(1, 8), with_aux=True)
model(ids).expert_load
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the sources laid out as they are installed."""
    folder = tmp_path_factory.mktemp("types")
    build = ["-W", "ignore", "setup.py", "--quiet", "build", "--build-base", folder / "base", "--build-lib", folder]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    return folder


def errors(installed: Path, folder: Path, code: str) -> list[int]:
    """The lines of `code` in which the type checker finds errors."""
    (folder / "code.py").write_text(code.lstrip())
    settings = {"include": ["code.py"], "extraPaths": [str(installed)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    checked = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", "-p", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(checked.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    return [
        found["range"]["start"]["line"] + 1 for found in report["generalDiagnostics"] if found["severity"] == "error"
    ]


@pytest.mark.parametrize("calls", [CALLS_OF_A_LAYER, CALLS_OF_A_MODEL], ids=["layer", "model"])
def test_results_are_known_by_the_arguments(calls, installed, tmp_path):
    assert errors(installed, tmp_path, calls) == []


def test_wrong_arguments_of_a_model_and_wrong_uses_of_its_results_are_found(installed, tmp_path):
    assert errors(installed, tmp_path, WRONG_CALLS_OF_A_MODEL) == [7, 8, 9]
