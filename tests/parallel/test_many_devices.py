"""More ranks than the other tests have, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "many_devices.py"


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "num_cases"), [(16, 2), (32, 1)])
def test_layers_on_many_devices_equal_the_layer_on_one(num_devices, num_cases):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(num_devices)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == num_cases
