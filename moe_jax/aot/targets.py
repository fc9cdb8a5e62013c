"""Accelerators that programs can be compiled for without one being present.

A target's `topology()` has devices on which programs can be lowered and compiled, not run; what is traced and lowered for it
must be inside its `lowering()`.

Some environment variables are read when jax is imported, so they have to be set before that; `check_environment` says which:

- `JAX_PLATFORMS=cpu`: no device is looked for, whatever the machine has;
- `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`: the CUDA plugin is content without a driver and without the CUDA libraries;
- `TPU_SKIP_MDS_QUERY=1`: libtpu doesn't look for the machine that it would run on;
- `ALLOW_MULTIPLE_LIBTPU_LOAD=1`: it doesn't insist on being loaded once on the whole machine.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from importlib import metadata

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import utils as mosaic_gpu_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.kernels.device import GPU_DEVICES, TPU_DEVICES, GpuDevice, TpuDevice, targeting

GPU_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
"""What must be set before jax is imported, to compile for GPUs."""
GPU_PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
"""What must be installed beside jax, in jax's own version, to compile for GPUs; nothing else of CUDA is needed."""


TPU_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""What must be set before jax is imported, to compile for TPUs."""
TPU_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""The smallest topology that the compiler knows of each generation; `tpu7x:2x2x1` has two devices per chip."""
LARGEST_SLICES = {"v5e": (16, 16), "v5p": (16, 20, 28), "v6e": (16, 16), "7x": (16, 16, 36)}
"""Chips along each axis of a whole pod of each generation. The compiler takes larger slices, too, and ends the process on them.

Source: the TPU system architecture pages of Google Cloud, which for 7x say 9,216 chips."""


class UnfitEnvironmentError(RuntimeError):
    """This process cannot compile for accelerators that it lacks; the message says what to do."""


_CLOCKS_GHZ = {"a100": 1.41, "h100": 1.98, "h200": 1.98, "b200": 1.965}
"""What XLA wants to know of a GPU beyond what `GpuDevice` says; it steers XLA's own cost estimates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """Hosts with GPUs of one kind."""

    device: GpuDevice
    """The kind of GPU."""
    hosts: int = 1
    """How many processes there are."""
    gpus_per_host: int = 1
    """How many GPUs each process has."""

    @classmethod
    def named(cls, name: str, *, hosts: int = 1, gpus_per_host: int = 1) -> "GpuTarget":
        """The target with the GPU of that name.

        Raises:
            ValueError: unknown name, or a number that is not positive.
        """
        if name not in GPU_DEVICES:
            raise ValueError(f"unknown GPU {name!r}; legal are {', '.join(GPU_DEVICES)}")
        if hosts < 1 or gpus_per_host < 1:
            raise ValueError(f"hosts and gpus_per_host must be at least 1, got {hosts} and {gpus_per_host}")
        return cls(device=GPU_DEVICES[name], hosts=hosts, gpus_per_host=gpus_per_host)

    @property
    def name(self) -> str:
        """As `target_named` reads it."""
        return f"{self.device.name}:{self.hosts}x{self.gpus_per_host}"

    @property
    def devices_per_host(self) -> int:
        """Consecutive devices that are joined by their own links."""
        return self.gpus_per_host

    def topology(self) -> topologies.TopologyDescription:
        """The GPUs, in a form that XLA compiles for.

        Raises:
            UnfitEnvironmentError: the environment is not fit for it, see `check_environment`.
        """
        check_environment()
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=self.device.name,
            target_config=target_config(self.device),
            topology=f"{self.hosts}x{self.gpus_per_host}x1",
        )

    def one_device(self) -> NamedSharding:
        """Sharding that puts an array on the first GPU."""
        return NamedSharding(Mesh(np.array(self.topology().devices[:1]), ("device",)), PartitionSpec())

    @contextlib.contextmanager
    def lowering(self) -> Iterator[None]:
        """Trace and lower for this target: kernels are chosen for its GPU, and lowered for its architecture.

        Without a GPU, Mosaic GPU lowers for Hopper whatever the target is, and there is no public way to say otherwise. It is
        said through a private function, which is put back afterwards; nothing else may be lowered meanwhile in other threads.
        """
        private = mosaic_gpu_utils._infer_arch
        mosaic_gpu_utils._infer_arch = lambda: self.device.compute_capability
        try:
            with targeting(self.device):
                yield
        finally:
            mosaic_gpu_utils._infer_arch = private


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTarget:
    """A slice of TPUs of one generation."""

    device: TpuDevice
    """The generation."""
    slice_name: str
    """Generation and number of chips along each axis, as in "v6e:16x16"."""

    @classmethod
    def named(cls, name: str) -> "TpuTarget":
        """The target of that name: of a device, which stands for its smallest slice, or of a slice, as in "v6e:16x16".

        Raises:
            ValueError: unknown name, or a slice that is larger than a pod.
        """
        generation, colon, shape = name.partition(":")
        device = TPU_DEVICES.get(generation.removeprefix("tpu"))
        if device is None:
            raise ValueError(
                f"unknown TPU {name!r}; legal are {', '.join(TPU_TOPOLOGIES)}, and slices such as"
                f" {', '.join(TPU_TOPOLOGIES.values())}"
            )
        smallest = TPU_TOPOLOGIES[device.name]
        if not colon:
            return cls(device=device, slice_name=smallest)
        _check_shape(name, shape, device)
        return cls(device=device, slice_name=f"{smallest.partition(':')[0]}:{shape}")

    @property
    def name(self) -> str:
        """As `target_named` reads it."""
        return self.slice_name

    @property
    def devices_per_host(self) -> None:
        """The links of a slice join the devices of all its hosts."""
        return None

    def topology(self) -> topologies.TopologyDescription:
        """The TPUs, in a form that XLA compiles for.

        Raises:
            UnfitEnvironmentError: the environment is not fit for it.
            ValueError: there is no slice of this shape.
        """
        _check_variables("TPUs", TPU_ENVIRONMENT)
        try:
            metadata.version("libtpu")
        except metadata.PackageNotFoundError:
            raise UnfitEnvironmentError(
                "to compile for TPUs ahead of time, libtpu must be installed; pip install libtpu"
            ) from None
        try:
            return topologies.get_topology_desc(self.slice_name, platform="tpu")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"there is no slice {self.slice_name!r}: {error}") from error

    def one_device(self) -> NamedSharding:
        """Sharding that puts an array on the first device."""
        return NamedSharding(Mesh(np.array(self.topology().devices[:1]), ("device",)), PartitionSpec())

    def lowering(self) -> contextlib.AbstractContextManager[None]:
        """Trace and lower for this target: kernels are chosen for its generation."""
        return targeting(self.device)


def _check_shape(name: str, shape: str, device: TpuDevice) -> None:
    """ValueError unless `shape` is chips along each axis, and fits into a pod in some orientation."""
    pod = LARGEST_SLICES[device.name]
    sizes = shape.split("x")
    legal = f"chips along each axis, at most {'x'.join(map(str, pod))}, as in {TPU_TOPOLOGIES[device.name]}"
    if not all(size.isascii() and size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"the shape of {name!r} must be {legal}; got {shape!r}")
    longest_first = sorted(map(int, sizes), reverse=True)
    largest = itertools.zip_longest(longest_first, sorted(pod, reverse=True), fillvalue=1)
    if any(size > most for size, most in largest):
        raise ValueError(f"there is no slice {name!r}: its shape must be {legal}")


Target = GpuTarget | TpuTarget


def target_named(name: str) -> Target:
    """The target of that name: a slice of TPUs, as in "v6e:16x16", or hosts x GPUs per host, as in "h200:2x8".

    A name without a shape stands for the smallest: one GPU, or the smallest slice of TPUs.

    Raises:
        ValueError: unknown name, or a slice that is larger than a pod.
    """
    kind, colon, shape = name.partition(":")
    if kind.removeprefix("tpu") in TPU_DEVICES:
        return TpuTarget.named(name)
    if kind not in GPU_DEVICES:
        raise ValueError(
            f"unknown target {name!r}; legal are TPUs ({', '.join(TPU_TOPOLOGIES)}) with the shape of their slice, as in"
            f" v6e:16x16, and GPUs ({', '.join(GPU_DEVICES)}) with hosts and GPUs per host, as in h200:2x8"
        )
    if not colon:
        return GpuTarget.named(kind)
    sizes = shape.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"the shape of {name!r} must be hosts x GPUs per host, as in {kind}:2x8; got {shape!r}")
    return GpuTarget.named(kind, hosts=int(sizes[0]), gpus_per_host=int(sizes[1]))


def _check_variables(accelerators: str, needed: Mapping[str, str]) -> None:
    unset = {name: value for name, value in needed.items() if os.environ.get(name) != value}
    if unset:
        wanted = " ".join(f"{name}={value}" for name, value in unset.items())
        found = ", ".join(f"{name}={os.environ.get(name)!r}" for name in unset)
        raise UnfitEnvironmentError(
            f"to compile for {accelerators} ahead of time, start Python with {wanted} set; found {found}"
        )


def check_environment() -> None:
    """Whether this process can compile for GPUs that it lacks.

    Raises:
        UnfitEnvironmentError: a variable is not set, or a plugin is missing or of another version than jax; says what to do.
    """
    _check_variables("GPUs", GPU_ENVIRONMENT)
    for plugin in GPU_PLUGINS:
        try:
            version = metadata.version(plugin)
        except metadata.PackageNotFoundError:
            version = None
        if version != jax.__version__:
            wanted = " ".join(f"{name}=={jax.__version__}" for name in GPU_PLUGINS)
            raise UnfitEnvironmentError(
                f"to compile for GPUs ahead of time, {plugin} of jax's version {jax.__version__} must be installed, found"
                f" {version}; pip install {wanted} (no other CUDA package is needed)"
            )


def target_config(device: GpuDevice) -> str:
    """Text form of XLA's `GpuTargetConfigProto` for one of `GPU_DEVICES`."""
    major, minor = device.compute_capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{device.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  core_count: {device.multiprocessors}
  fpus_per_core: 128
  clock_rate_ghz: {_CLOCKS_GHZ[device.name]}
  device_memory_size: {device.memory_bytes}
  memory_bandwidth: {int(device.hbm_bytes_per_second)}
  l2_cache_size: {device.l2_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {device.shared_memory_bytes}
  shared_memory_per_core: {device.shared_memory_bytes + 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{device.name}"
"""
