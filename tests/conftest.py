"""What every test shares: a CPU with eight devices, fresh random numbers, and the oracles on the import path."""

import itertools
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `from support import small_models`, `from oracles import routing`

from support.xla_flags import xla_flags

# Before the first import of jax, which reads both once. Of flags that are given twice, the last counts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}".strip()

import numpy as np
import pytest

SEED_VARIABLE = "MOE_JAX_TEST_SEED"
MEMORY_MAPS = Path("/proc/self/maps")
MOST_MEMORY_MAPS = 30_000
"""Linux lets a process have 65530. Every compiled program takes hundreds, and a compiler that gets none dies."""
TESTS_BETWEEN_COUNTS = 8

_finished_tests = itertools.count(1)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that differ every run; a failing test prints how to get the same ones again."""
    seed = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    print(f"random numbers from seed {seed}; to repeat: {SEED_VARIABLE}={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _memory_maps_do_not_run_out() -> Iterator[None]:
    """Let go of compiled programs before there are too many of them."""
    yield
    if next(_finished_tests) % TESTS_BETWEEN_COUNTS or "jax" not in sys.modules or not MEMORY_MAPS.exists():
        return
    with MEMORY_MAPS.open("rb") as maps:
        too_many = sum(1 for _ in maps) > MOST_MEMORY_MAPS
    if too_many:
        sys.modules["jax"].clear_caches()
