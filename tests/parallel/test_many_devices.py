"""More ranks than the other tests have, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.xla_flags import xla_flags

PROGRAM = Path(__file__).parents[1] / "support" / "many_devices.py"


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "num_cases"), [(16, 10), (32, 4)])
def test_layers_on_many_devices_equal_the_layer_on_one(num_devices, num_cases):
    environment = os.environ | {"XLA_FLAGS": xla_flags(num_devices)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(num_devices)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cases are equal", done.stdout)[1]) >= num_cases
