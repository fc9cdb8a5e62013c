"""A mesh for a model on a number of devices: how many positions split data, experts and the width of experts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from moe_jax.aot.sizes import Sizes
from moe_jax.config import DispatchStrategy, MoEConfig, ParallelConfig
from moe_jax.families.decoder import Decoder
from moe_jax.families.parameters import parameter_shapes
from moe_jax.models.cache import cached_features
from moe_jax.models.partitioning import Partitioning
from moe_jax.parallel import AXIS_ROLES, LayerAxes, axis_tuple, parallel_of, parse_axes

MEMORY_SHARE = 0.75
"""Part of a device's memory that weights and cache may take of a mesh that is chosen; the rest is for what programs need."""


class MeshChoice(NamedTuple):
    """A mesh, and why it is this one."""

    positions: dict[str, int]
    """Positions along "data", "expert" and "tensor", in this order: the last ones are the closest devices."""
    reason: str
    """One sentence."""


def choose_mesh(
    decoder: Decoder,
    num_devices: int,
    *,
    sizes: Sizes,
    itemsize: int,
    memory_bytes: int,
    strategy: DispatchStrategy | None = None,
) -> MeshChoice:
    """A mesh that uses every device and divides the experts evenly.

    Tensor parallelism leaves each rank a narrow slice of every expert, which fills matrix units badly. So of the meshes whose
    weights and cache take no more than `MEMORY_SHARE` of a device, those with the smallest tensor axis are left; of these the
    one with which a device holds the fewest bytes, of equal ones that with the largest expert axis. If no mesh is so small, it
    is the one with which a device holds the fewest bytes, however narrow its slices are.

    Args:
        decoder: the model.
        num_devices: devices.
        sizes: of the generation, which the cache depends on.
        itemsize: bytes of a number.
        memory_bytes: memory of a device.
        strategy: how tokens meet their experts.
    """
    mixtures = {layer.feed_forward for layer in decoder.layers if isinstance(layer.feed_forward, MoEConfig)}
    meshes = (
        {"data": num_devices // (expert * tensor), "expert": expert, "tensor": tensor}
        for expert in _divisors(num_devices)
        for tensor in _divisors(num_devices // expert)
    )
    candidates = [
        positions for positions in meshes if all(_divides(mixture, positions, strategy) for mixture in mixtures)
    ]
    held = {
        tuple(positions.values()): held_bytes(decoder, positions, sizes=sizes, itemsize=itemsize, strategy=strategy)
        for positions in candidates
    }
    room = MEMORY_SHARE * memory_bytes
    fits = min(held.values()) <= room

    def cost(positions: dict[str, int]) -> tuple[bool, int, float, int]:
        size = held[tuple(positions.values())]
        return size > room, positions["tensor"] if fits else 0, size, -positions["expert"]

    chosen = min(candidates, key=cost)
    size = f"{held[tuple(chosen.values())] / 1e9:,.2f} GB"
    if fits:
        reason = (
            f"the smallest tensor axis with which weights and cache take at most {MEMORY_SHARE:.0%} of a device's memory, and "
            f"with these the fewest bytes of them: {size}"
        )
    else:
        reason = f"the fewest bytes of weights and cache, {size}; with every mesh they take over {MEMORY_SHARE:.0%} of a device"
    return MeshChoice(chosen, reason)


def held_bytes(
    decoder: Decoder,
    positions: Mapping[str, int],
    *,
    sizes: Sizes,
    itemsize: int,
    strategy: DispatchStrategy | None = None,
) -> float:
    """Bytes of weights and cache that a device holds on a mesh of these positions, all numbers being of one size."""
    mesh = _shape_of_mesh(positions)
    partitioning = Partitioning.of(parallel_for(mesh, strategy), mesh)
    total = 0.0
    for path, shape in parameter_shapes(decoder).items():
        if ".routed_experts." in path:
            parts = positions["expert"] * positions["tensor"]
        elif ".shared_experts." in path:
            parts = partitioning.size(partitioning.shared)
        else:
            parts = _parts(partitioning, partitioning.parameter_spec(path, decoder))
        total += math.prod(shape) / parts
    for layer in decoder.layers:
        for features in cached_features(layer.attention):
            numbers = sizes.batch_size * sizes.cache_length * math.prod(features)
            total += numbers / _parts(partitioning, partitioning.cache_spec(features, sizes.batch_size))
    return total * itemsize


def parallel_for(mesh: Mesh | AbstractMesh, strategy: DispatchStrategy | None) -> ParallelConfig:
    """How a model is split over the axes "data", "expert" and "tensor".

    Args:
        mesh: with these axes.
        strategy: how tokens meet their experts. With one that moves tokens, the ranks that hold different experts hold different
            rows of the batch too.
    """
    parallel = parallel_of(mesh)  # pyright: ignore[reportArgumentType]  # names are all it reads
    if strategy is None:
        return parallel
    rows = "data" if strategy == "replicated" else ("data", "expert")
    return dataclasses.replace(parallel, strategy=strategy, data_axis=rows)


def _parts(partitioning: Partitioning, spec: PartitionSpec) -> int:
    return math.prod(partitioning.size(axis_tuple(dimension)) for dimension in spec)


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Positions from text such as "data=2,expert=32"; axes that aren't named have one.

    Raises:
        ValueError: the text is none that `parse_axes` reads, or doesn't multiply to the number of devices.
    """
    try:
        sizes = parse_axes(text)
    except ValueError as error:
        raise ValueError(f"a mesh {error}") from None
    positions = math.prod(sizes.values())
    if positions != num_devices:
        raise ValueError(f"the mesh {text} needs {positions} devices, got {num_devices}")
    return {name: sizes.get(name, 1) for name in AXIS_ROLES}


def _divides(config: MoEConfig, positions: Mapping[str, int], strategy: DispatchStrategy | None) -> bool:
    """Whether the layer can be split so: with a strategy that moves tokens, fewer ranks share its shared experts."""
    mesh = _shape_of_mesh(positions)
    try:
        LayerAxes.resolve(parallel_for(mesh, strategy), mesh).validate(config)
    except ValueError:
        return False
    return True


def _shape_of_mesh(positions: Mapping[str, int]) -> Any:
    """Names and sizes of axes, which is all that is read of a mesh here, whose devices are not known yet."""
    return AbstractMesh(tuple(positions.values()), tuple(positions))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
