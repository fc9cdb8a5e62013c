"""Runs `check_transformers.py` in the environment that holds torch and `transformers`."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN_PYTHON = REPOSITORY / ".venv-golden/bin/python"


@pytest.mark.transformers
def test_transformers_loads_every_export_and_finds_the_same_model(capfd):
    command = Path(sys.executable).with_name("moe-jax")
    script = Path(__file__).with_name("check_transformers.py")
    with capfd.disabled():  # the table is the point of the check: show it as it grows
        print()
        status = subprocess.run([GOLDEN_PYTHON, script, "--moe-jax", command], check=False).returncode
    assert status == 0, f"{status} exports failed, see the table above"
