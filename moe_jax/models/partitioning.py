"""How a model is spread over a mesh: which axes split the batch, and which the parameters outside the experts.

Ranks that hold the same tokens share the work on them: they split attention by heads, dense MLPs by intermediate
features, embedding and output head by vocabulary. These are the ranks of the tensor axes, and those of the expert axes
that do not split tokens as well. The MoE layers decide for themselves (`MoERunner.partition_specs`).

What does not divide evenly stays whole: units are split over as many of those axes as divide them, outer ones first, and
`Partitioning.remarks` says what is left. The compiler moves the data (GSPMD); arrays are constrained at few places.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Self

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig, ParallelConfig
from moe_jax.families.decoder import Decoder, GroupedQueryAttention, Layer
from moe_jax.families.parameter_splits import Split, Units, split_of
from moe_jax.parallel import axis_tuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partitioning:
    """Mesh axes of a model's dense parts."""

    mesh: Mesh
    batch: tuple[str, ...]
    """Axes that split the batch of token rows."""
    shared: tuple[str, ...]
    """Axes whose ranks hold the same tokens and so split the work on them, in the order of the mesh: its outer axes join
    hosts, so what a host holds lies together."""

    @classmethod
    def of(cls, parallel: ParallelConfig, mesh: Mesh) -> Self:
        """The axes that `parallel` names."""
        batch = axis_tuple(parallel.data_axis)
        sharing = set(axis_tuple(parallel.tensor_axis) + axis_tuple(parallel.expert_axis)) - set(batch)
        return cls(mesh=mesh, batch=batch, shared=tuple(axis for axis in mesh.axis_names if axis in sharing))

    def size(self, axes: tuple[str, ...]) -> int:
        """Ranks along `axes`."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def axes_for(self, count: int) -> tuple[str, ...]:
        """The axes over which `count` units are split: as many of `shared`, from the first on, as divide them evenly.

        From the first on, so that fewer key/value heads than query heads end up with the query heads that they belong to.
        """
        chosen: tuple[str, ...] = ()
        for axis in self.shared:
            if count % self.size((*chosen, axis)):
                break
            chosen = (*chosen, axis)
        return chosen

    def batch_axes_for(self, rows: int) -> tuple[str, ...]:
        """The axes over which a batch of `rows` is split: all of `batch`, or none if they don't divide it."""
        return () if rows % self.size(self.batch) else self.batch

    def constrain_tokens(self, x: Float[Array, "B S H"]) -> Float[Array, "B S H"]:
        """`x` split over the batch axes, whole on all ranks that share tokens."""
        spec = PartitionSpec(self.batch_axes_for(x.shape[0]) or None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def parameter_spec(self, path: str, decoder: Decoder) -> PartitionSpec:
        """How the parameter at `path` of `moe_jax.families.parameter_shapes`, outside of MoE layers, is split."""
        split = split_of(path)
        if split is None:
            return PartitionSpec()
        axes = self.axes_for(unit_count(split, path, decoder))
        return PartitionSpec(*[None] * split.dimension, axes) if axes else PartitionSpec()

    def cache_spec(self, features: tuple[int, ...], batch_size: int) -> PartitionSpec:
        """How `[layers, batch, slots, *features]` of a cache is split: keys and values by heads, latents not."""
        heads = self.axes_for(features[0]) if len(features) > 1 else ()
        return PartitionSpec(None, self.batch_axes_for(batch_size) or None, None, heads or None)

    def constrain_cache(
        self, array: Float[Array, "layers B slots *features"]
    ) -> Float[Array, "layers B slots *features"]:
        """A cache split as it was created.

        Where ranks outnumber key/value heads, the compiler would split these among some of the ranks while it computes a step,
        as it does query heads, and gather the whole cache again before the program ends: with every token that is streamed.
        """
        spec = self.cache_spec(array.shape[3:], array.shape[1])
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))

    def remarks(self, decoder: Decoder) -> tuple[str, ...]:
        """What the ranks that share tokens don't split among all of them, one sentence each."""
        ranks, found = self.size(self.shared), []
        for count, units in sorted(set(_units(decoder)), key=lambda pair: (pair[1], pair[0])):
            axes = self.axes_for(count)
            if axes != self.shared:
                parts = f"split {self.size(axes)} ways (over {', '.join(axes)})" if axes else "held whole by each rank"
                found.append(f"{count} {units} cannot be split over the {ranks} ranks of {self.shared}: {parts}")
        return tuple(found)


def unit_count(split: Split, path: str, decoder: Decoder) -> int:
    """How many units the split axis of the parameter at `path` consists of."""
    if split.units == "vocabulary entries":
        return decoder.vocab_size
    layer = decoder.layers[int(path.split(".")[1])]
    return _layer_units(layer)[split.units]


def _layer_units(layer: Layer) -> Mapping[Units, int]:
    attention, feed_forward = layer.attention, layer.feed_forward
    units: dict[Units, int] = {"query heads": attention.num_heads}
    if isinstance(attention, GroupedQueryAttention):
        units["key/value heads"] = attention.num_kv_heads
    if not isinstance(feed_forward, MoEConfig):
        units["intermediate features"] = feed_forward.intermediate_size
    return units


def _units(decoder: Decoder) -> Iterator[tuple[int, Units]]:
    yield decoder.vocab_size, "vocabulary entries"
    for layer in decoder.layers:
        for units, count in _layer_units(layer).items():
            yield count, units
