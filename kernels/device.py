"""The accelerator that a kernel is built for: the one at hand, or one that is named because it is not."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from .selection import platform_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuDevice:
    """What kernels and their tile sizes depend on. Hashable: part of the key of every compiled program."""

    name: str
    """As in file names of tuned entries: "h100", "h200", "b200" …"""
    compute_capability: tuple[int, int]
    """(9, 0) is Hopper, (10, 0) Blackwell."""
    multiprocessors: int
    """How many blocks run side by side when each takes a multiprocessor for itself."""
    shared_memory_bytes: int
    """Most shared memory that one block can have."""
    l2_bytes: int
    """Size of the second-level cache."""


GPU_DEVICES: dict[str, GpuDevice] = {
    device.name: device
    for device in (
        GpuDevice(
            name="a100",
            compute_capability=(8, 0),
            multiprocessors=108,
            shared_memory_bytes=166_912,
            l2_bytes=41_943_040,
        ),
        GpuDevice(
            name="h100",
            compute_capability=(9, 0),
            multiprocessors=132,
            shared_memory_bytes=232_448,
            l2_bytes=52_428_800,
        ),
        GpuDevice(
            name="h200",
            compute_capability=(9, 0),
            multiprocessors=132,
            shared_memory_bytes=232_448,
            l2_bytes=62_914_560,
        ),
        GpuDevice(
            name="b200",
            compute_capability=(10, 0),
            multiprocessors=148,
            shared_memory_bytes=232_448,
            l2_bytes=132_644_864,
        ),
    )
}
"""Devices that can be compiled for without being present. A present device reports its own number of multiprocessors."""

_target = jax.make_user_context(None)


@contextmanager
def targeting(device: GpuDevice) -> Iterator[None]:
    """Trace and choose kernels for `device` instead of the device at hand: to compile ahead of time, or to interpret.

    Part of the key of `jax.jit`'s caches, so that what was traced for one device never runs on another.
    """
    with _target(device):
        yield


def gpu_device_of(*arrays: object) -> GpuDevice | None:
    """The GPU that computes on these arrays (see `platform_of`), or the one of `targeting`; None if it is no NVIDIA GPU."""
    if _target.value is not None:
        return _target.value
    if platform_of(*arrays) != "gpu":
        return None
    device = jax.devices("gpu")[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or "." not in str(capability):
        return None  # ROCm reports an architecture's name
    major, minor = (int(part) for part in str(capability).split("."))
    known = next((known for known in GPU_DEVICES.values() if known.name.upper() in device.device_kind.upper()), None)
    if known is None:
        known = next(
            (known for known in GPU_DEVICES.values() if known.compute_capability[0] == major), GPU_DEVICES["a100"]
        )
        known = dataclasses.replace(known, name=device.device_kind.lower().replace(" ", "-"))
    return dataclasses.replace(known, compute_capability=(major, minor), multiprocessors=device.core_count)
