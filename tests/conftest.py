"""What every test shares: a CPU with eight devices, fresh random numbers, and the oracles on the import path."""

import os
import secrets
import sys
from pathlib import Path

# Before the first import of jax, which reads both once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
if _DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICE_COUNT_FLAG}=8".strip()

sys.path.insert(0, str(Path(__file__).parent))  # `import oracle`, `from oracles import routing`

import numpy as np  # noqa: E402
import pytest  # noqa: E402

SEED_VARIABLE = "MOE_JAX_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; left out unless asked for with -m slow (or -m '')")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that differ every run; a failing test prints how to get the same ones again."""
    seed = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    print(f"random numbers from seed {seed}; to repeat: {SEED_VARIABLE}={seed}")
    return np.random.default_rng(seed)
