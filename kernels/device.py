"""The accelerator that a kernel is built for: the one at hand, or one that is named because it is not."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import jax

from .selection import platform_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuDevice:
    """What kernels and their tile sizes depend on. Hashable: part of the key of every compiled program."""

    platform: ClassVar[str] = "gpu"
    """As JAX calls it."""
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
    memory_bytes: int
    """Size of the device memory, as the driver reports it."""
    flops_per_second: float
    """Peak of dense bfloat16 products with float32 accumulation."""
    hbm_bytes_per_second: float
    """Peak of reading and writing device memory."""
    link_bytes_per_second: float
    """Peak of sending to the other GPUs of the same host (NVLink, one direction)."""


GPU_DEVICES: dict[str, GpuDevice] = {
    device.name: device
    for device in (
        GpuDevice(
            name="a100",
            compute_capability=(8, 0),
            multiprocessors=108,
            shared_memory_bytes=166_912,
            l2_bytes=41_943_040,
            memory_bytes=85_100_068_864,
            flops_per_second=312e12,
            hbm_bytes_per_second=2039.04e9,
            link_bytes_per_second=300e9,
        ),
        GpuDevice(
            name="h100",
            compute_capability=(9, 0),
            multiprocessors=132,
            shared_memory_bytes=232_448,
            l2_bytes=52_428_800,
            memory_bytes=84_942_979_072,
            flops_per_second=989.4e12,
            hbm_bytes_per_second=3352.32e9,
            link_bytes_per_second=450e9,
        ),
        GpuDevice(
            name="h200",
            compute_capability=(9, 0),
            multiprocessors=132,
            shared_memory_bytes=232_448,
            l2_bytes=62_914_560,
            memory_bytes=151_397_597_184,
            flops_per_second=989.4e12,
            hbm_bytes_per_second=4800e9,
            link_bytes_per_second=450e9,
        ),
        GpuDevice(
            name="b200",
            compute_capability=(10, 0),
            multiprocessors=148,
            shared_memory_bytes=232_448,
            l2_bytes=132_644_864,
            memory_bytes=191_514_411_008,
            flops_per_second=2250e12,
            hbm_bytes_per_second=7672.32e9,
            link_bytes_per_second=900e9,
        ),
    )
}
"""Devices that can be compiled for without being present. A present device reports its own number of multiprocessors.

Peaks are those of the SXM boards (B200: of an HGX board), without sparsity. Source: NVIDIA's data sheets.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuDevice:
    """One device as JAX counts them: a chip, or one of the two halves of a 7x chip. Hashable, as `GpuDevice`."""

    platform: ClassVar[str] = "tpu"
    """As JAX calls it."""
    name: str
    """As in file names of tuned entries: "v5e", "v5p", "v6e", "7x"."""
    vmem_bytes: int
    """Vector memory of a core: what a kernel's operands, results and temporaries must fit into."""
    mxu_size: int
    """Rows and columns of a matrix unit."""
    cores: int
    """Cores of the device, over which a kernel's parallel grid dimension is split."""
    flops_per_second: float
    """Peak of bfloat16 products with float32 accumulation, of all cores together."""
    hbm_bytes_per_second: float
    """Peak of reading and writing device memory."""
    memory_bytes: int
    """Size of the device memory."""
    link_bytes_per_second: float
    """Peak of sending to other devices of the slice (inter-chip interconnect: all links together, one direction)."""


TPU_DEVICES: dict[str, TpuDevice] = {
    device.name: device
    for device in (
        TpuDevice(
            name="v5e",
            vmem_bytes=128 * 2**20,
            mxu_size=128,
            cores=1,
            flops_per_second=197e12,
            hbm_bytes_per_second=819e9,
            memory_bytes=16 * 2**30,
            link_bytes_per_second=200e9,
        ),
        TpuDevice(
            name="v5p",
            vmem_bytes=64 * 2**20,
            mxu_size=128,
            cores=2,
            flops_per_second=459e12,
            hbm_bytes_per_second=2765e9,
            memory_bytes=95 * 2**30,
            link_bytes_per_second=600e9,
        ),
        TpuDevice(
            name="v6e",
            vmem_bytes=128 * 2**20,
            mxu_size=256,
            cores=1,
            flops_per_second=918e12,
            hbm_bytes_per_second=1640e9,
            memory_bytes=32 * 2**30,
            link_bytes_per_second=400e9,
        ),
        TpuDevice(
            name="7x",
            vmem_bytes=64 * 2**20,
            mxu_size=256,
            cores=1,
            flops_per_second=1153.5e12,
            hbm_bytes_per_second=3690e9,
            memory_bytes=96 * 2**30,
            link_bytes_per_second=300e9,
        ),
    )
}
"""Devices that can be compiled for without being present. Source: the TPU system architecture pages of Google Cloud."""

_TPU_KINDS = {
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "7x": ("TPU7x", "TPU v7x"),
}
"""What `jax.Device.device_kind` calls each of them."""

_target = jax.make_user_context(None)


@contextmanager
def targeting(device: GpuDevice | TpuDevice) -> Iterator[None]:
    """Trace and choose kernels for `device` instead of the device at hand: to compile ahead of time, or to interpret.

    Part of the key of `jax.jit`'s caches, so that what was traced for one device never runs on another.
    """
    with _target(device):
        yield


def gpu_device_of(*arrays: object) -> GpuDevice | None:
    """The GPU that computes on these arrays (see `platform_of`), or the one of `targeting`; None if it is no NVIDIA GPU."""
    if _target.value is not None:
        return _target.value if isinstance(_target.value, GpuDevice) else None
    if platform_of(*arrays) != "gpu":
        return None
    device = jax.devices("gpu")[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or "." not in str(capability):
        return None  # ROCm reports an architecture's name
    major, minor = (int(part) for part in str(capability).split("."))
    words = re.split(r"[^A-Z0-9]+", device.device_kind.upper())  # an H200 is no GH200
    known = next((known for known in GPU_DEVICES.values() if known.name.upper() in words), None)
    if known is None:
        known = next(
            (known for known in GPU_DEVICES.values() if known.compute_capability[0] == major), GPU_DEVICES["a100"]
        )
        known = dataclasses.replace(known, name=device.device_kind.lower().replace(" ", "-"))
    return dataclasses.replace(known, compute_capability=(major, minor), multiprocessors=device.core_count)


def tpu_device_of(*arrays: object) -> TpuDevice | None:
    """The TPU that computes on these arrays (see `platform_of`), or the one of `targeting`.

    None if it is no TPU, or none of `TPU_DEVICES`: kernels are built for what is known of a device.
    """
    if _target.value is not None:
        return _target.value if isinstance(_target.value, TpuDevice) else None
    if platform_of(*arrays) != "tpu":
        return None
    kind = jax.devices("tpu")[0].device_kind
    return next((TPU_DEVICES[name] for name, kinds in _TPU_KINDS.items() if kind in kinds), None)
