"""Which GPU kernels are built for."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from moe_jax.kernels import device as device_module
from moe_jax.kernels.device import GPU_DEVICES, gpu_device_of, targeting


def test_a_machine_without_gpu_has_none():
    assert gpu_device_of(jnp.ones(3)) is None


def test_the_named_device_is_the_innermost_and_is_forgotten_afterwards():
    array = jnp.ones(3)
    with targeting(GPU_DEVICES["h200"]):
        with targeting(GPU_DEVICES["b200"]):
            assert gpu_device_of(array) == GPU_DEVICES["b200"]
        assert gpu_device_of(array) == GPU_DEVICES["h200"]
    assert gpu_device_of(array) is None


def test_the_named_device_is_part_of_the_key_of_compiled_programs():
    traced_for = []

    @jax.jit
    def function(x):
        traced_for.append(getattr(gpu_device_of(x), "name", None))
        return x + 1

    x = jnp.ones(3)
    for name in ("h200", "b200", "h200", None, "b200", None):
        if name is None:
            function(x)
        else:
            with targeting(GPU_DEVICES[name]):
                function(x)
    assert traced_for == ["h200", "b200", None]
    with targeting(dataclasses.replace(GPU_DEVICES["h200"], multiprocessors=2)):
        function(x)
    assert traced_for == ["h200", "b200", None, "h200"]


def present(monkeypatch, kind, capability, multiprocessors=100):
    """What is made of a GPU that JAX describes like this."""
    reported = SimpleNamespace(device_kind=kind, compute_capability=capability, core_count=multiprocessors)
    monkeypatch.setattr(device_module, "platform_of", lambda *arrays: "gpu")
    monkeypatch.setattr(jax, "devices", lambda platform: [reported])
    return gpu_device_of(jax.ShapeDtypeStruct((), jnp.float32))


@pytest.mark.parametrize(
    ("kind", "capability", "name"),
    [
        ("NVIDIA H200", "9.0", "h200"),
        ("NVIDIA H100 80GB HBM3", "9.0", "h100"),
        ("NVIDIA B200", "10.0", "b200"),
        ("NVIDIA A100-SXM4-80GB", "8.0", "a100"),
    ],
)
def test_a_known_device_is_recognised_and_reports_its_own_multiprocessors(kind, capability, name, monkeypatch):
    assert present(monkeypatch, kind, capability) == dataclasses.replace(GPU_DEVICES[name], multiprocessors=100)


@pytest.mark.parametrize(
    ("kind", "capability", "like"),
    [
        ("NVIDIA GH300 Next", "9.0", "h100"),
        ("NVIDIA GH200 480GB", "9.0", "h100"),
        ("NVIDIA B300 SXM6", "10.3", "b200"),
        ("NVIDIA L4", "8.9", "a100"),
        ("Tesla T4", "7.5", "a100"),
    ],
)
def test_an_unknown_device_keeps_its_name_and_capability_and_has_the_sizes_of_its_generation(
    kind, capability, like, monkeypatch
):
    device = present(monkeypatch, kind, capability, multiprocessors=58)
    assert device.name == kind.lower().replace(" ", "-")
    assert device.compute_capability == tuple(map(int, capability.split(".")))
    assert device.multiprocessors == 58
    assert device.shared_memory_bytes == GPU_DEVICES[like].shared_memory_bytes


@pytest.mark.parametrize("capability", [None, "gfx942"])
def test_a_gpu_of_another_maker_is_none(capability, monkeypatch):
    assert present(monkeypatch, "AMD Instinct MI300X", capability) is None
