"""The benchmark of the conversion, as far as it isn't the conversion itself."""

import importlib.util
import os
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "convert.py"


@pytest.fixture
def convert():
    spec = importlib.util.spec_from_file_location("benchmarks_convert", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cores_are_counted_with_what_the_oldest_python_has(convert, monkeypatch):
    monkeypatch.delattr(os, "process_cpu_count", raising=False)  # new in Python 3.13
    assert "process_cpu_count(" not in FILE.read_text()
    assert convert.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # not on every system
    assert convert.usable_cores() == os.cpu_count()
