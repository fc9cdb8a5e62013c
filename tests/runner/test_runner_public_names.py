"""The package's public names: lazy, listed, and cheap to import."""

import subprocess
import sys

import pytest

import moe_jax


@pytest.mark.parametrize("name", moe_jax.__all__)
def test_every_public_name_resolves(name):
    assert getattr(moe_jax, name).__name__ == name


def test_dir_lists_every_public_name():
    assert set(moe_jax.__all__) <= set(dir(moe_jax))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moe_jax' has no attribute 'MoELayer'"):
        _ = moe_jax.MoELayer


def run(program):
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_else():
    assert run("import sys, moe_jax; print({'jax', 'flax'} & set(sys.modules))") == "set()\n"


def test_importing_a_layer_imports_no_checkpoint_or_command_line_library():
    heavy = {"orbax", "matplotlib", "rich", "tokenizers", "huggingface_hub", "safetensors"}
    program = f"import sys, jax, flax.nnx; before = set(sys.modules); import moe_jax; moe_jax.MoERunner; \
        print(sorted({heavy} & (set(sys.modules) - before)))"
    assert run(program) == "[]\n"
