"""Every tensor of a checkpoint in the Hugging Face form, and the region of our parameters that it is.

The plan follows from the configuration alone. Reading walks it forwards, exporting backwards, checking compares it with
what is there.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.families import Decoder, Family, parameter_shapes
from moe_jax.families.names import CheckpointForm, ExpertNames

from .errors import CheckpointError
from .layout import COPY, LINEAR, Layout, Shape, parse_layout
from .mapping import HALF_OF_SHARD, LEAF_OF_SUFFIX, make_expert_params_mapping

FORMS: tuple[CheckpointForm, ...] = ("per_expert", "fused")

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT_LEAF = re.compile(r"layers\.(\d+)\.feed_forward\.routed_experts\.(\w+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint and the region of one of our parameters that holds the same numbers."""

    name: str
    """The checkpoint's name."""
    path: str
    """Our parameter."""
    layout: Layout
    """How the tensor's axes relate to the region's."""
    region_shape: Shape
    """Shape of the region."""
    index: tuple[int, ...] = ()
    """The region is `parameter[index]`: () the whole, (expert,) or (expert, half) for a tensor of one expert."""
    packed_layout: Layout | None = None
    """The layout if the tensor is stored as MXFP4, whose rows are output features; None: it never is."""

    @property
    def shape(self) -> Shape:
        """Shape of the (unpacked) tensor."""
        return self.layout.stored_shape(self.region_shape)

    def region(self, part: np.ndarray, start: int = 0) -> np.ndarray:
        """The tensor's region inside `part`, the slice of our parameter that begins at `start` of its sliced axis."""
        if not self.index:
            return part
        return part[(self.index[0] - start, *self.index[1:])]

    def rows(self, start: int, stop: int) -> range:
        """Rows of the tensor that lie in the slice of our parameter from `start` up to `stop`."""
        if not self.index:
            return range(start, stop)
        return range(self.shape[0] if start <= self.index[0] < stop else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """All tensors of one form of a checkpoint."""

    form: CheckpointForm
    shapes: Mapping[str, Shape]
    """Our parameters, in the order of a forward pass."""
    tensors: Mapping[str, tuple[StoredTensor, ...]]
    """Parameter -> the tensors that make it up, in its order."""

    def __iter__(self) -> Iterator[StoredTensor]:
        for tensors in self.tensors.values():
            yield from tensors

    def sliced_axis(self, path: str) -> int:
        """The axis of a parameter along which a slice is consecutive in the checkpoint."""
        first = self.tensors[path][0]
        return 0 if first.index else first.layout.sliced_axis


def is_expert_leaf(path: str) -> bool:
    """Whether the first axis of the parameter is the experts'."""
    return _EXPERT_LEAF.fullmatch(path) is not None


def layer_of(path: str) -> int | None:
    """Number of the layer that a parameter belongs to, None outside the layers."""
    match = _LAYER.match(path)
    return int(match[1]) if match else None


def default_sliced_axis(path: str) -> int:
    """The axis along which parameters are sliced: outputs of a linear map, else the first."""
    return LINEAR.sliced_axis if path.endswith(".kernel") else 0


def check_form(form: object) -> None:
    """CheckpointError unless `form` is one that some family has."""
    if form not in FORMS:
        raise CheckpointError(f"form must be one of {', '.join(FORMS)}; got {form!r}")


def plan_tensors(decoder: Decoder, family: Family, form: CheckpointForm) -> TensorPlan:
    """The tensors of `form` for this decoder.

    Raises:
        CheckpointError: The family has no such form, or `form` is unknown.
    """
    check_form(form)
    if form == "per_expert" and family.experts.per_expert_block is None:
        raise CheckpointError(f"{family.model_type} checkpoints have no per_expert form; its form is fused")
    shapes = parameter_shapes(decoder)
    names = {**family.names, **(family.fused_names if form == "fused" else {})}
    tensors: dict[str, tuple[StoredTensor, ...]] = {}
    for layer in decoder.moe_layers:
        moe = cast(MoEConfig, decoder.layers[layer].feed_forward)
        prefix = f"layers.{layer}.feed_forward."
        leaves = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
        expert_leaves = {leaf: shape for leaf, shape in leaves.items() if leaf.startswith("routed_experts.")}
        if form == "per_expert":
            found = _per_expert_tensors(family.experts, layer, moe.num_experts, prefix, expert_leaves)
        else:
            found = _fused_tensors(family.experts, layer, prefix, expert_leaves)
        for tensor in found:
            tensors[tensor.path] = (*tensors.get(tensor.path, ()), tensor)
    ordered: dict[str, tuple[StoredTensor, ...]] = {}
    for path, shape in shapes.items():
        ordered[path] = tensors[path] if path in tensors else (_plain_tensor(path, shape, names, family),)
    return TensorPlan(form=form, shapes=shapes, tensors=ordered)


def _plain_tensor(path: str, shape: Shape, names: Mapping[str, str], family: Family) -> StoredTensor:
    template = _LAYER.sub("layers.{layer}.", path)
    if template not in names:
        raise CheckpointError(f"the family row of {family.model_type} has no name for {template}")
    layout = LINEAR if path.endswith(".kernel") else COPY[len(shape)]
    return StoredTensor(name=names[template].format(layer=layer_of(path)), path=path, layout=layout, region_shape=shape)


def _per_expert_tensors(
    names: ExpertNames, layer: int, num_experts: int, prefix: str, leaves: Mapping[str, Shape]
) -> Iterator[StoredTensor]:
    """One matrix (or bias) per expert and projection, found by the rows of the expert mapping."""
    block = cast(str, names.per_expert_block).format(layer=layer)
    mapping = make_expert_params_mapping(names.gate, names.down, names.up, num_experts)
    for parameter, checkpoint, expert, shard in mapping:
        for suffix, ending in LEAF_OF_SUFFIX.items():
            if (leaf := parameter + ending) in leaves:
                index = (expert,) if shard == "w2" else (expert, HALF_OF_SHARD[shard])
                region_shape = leaves[leaf][len(index) :]
                yield StoredTensor(
                    name=f"{block}.{checkpoint}{suffix}",
                    path=prefix + leaf,
                    layout=COPY[len(region_shape)],
                    region_shape=region_shape,
                    index=index,
                )


def _fused_tensors(names: ExpertNames, layer: int, prefix: str, leaves: Mapping[str, Shape]) -> Iterator[StoredTensor]:
    """All experts of a projection in one tensor."""
    merged = "(i g)" if names.fused_interleaved else "(g i)"
    packed = {
        "gate_up_proj": parse_layout(f"e {merged} h -> e g i h"),
        "down_proj": parse_layout("e h i -> e h i"),
    }
    transposed = {
        "gate_up_proj": parse_layout(f"e h {merged} -> e g i h"),
        "down_proj": parse_layout("e i h -> e h i"),
    }
    biases = {
        "gate_up_bias": ("gate_up_proj_bias", parse_layout(f"e {merged} -> e g i")),
        "down_bias": ("down_proj_bias", parse_layout("e h -> e h")),
    }
    block = names.fused_block.format(layer=layer)
    for path, shape in leaves.items():
        leaf = path.removeprefix("routed_experts.")
        if leaf in biases:
            theirs, layout = biases[leaf]
            packed_layout = None
        else:
            theirs, packed_layout = leaf, packed[leaf]
            layout = transposed[leaf] if names.fused_transposed else packed_layout
        yield StoredTensor(
            name=f"{block}.experts.{theirs}",
            path=prefix + path,
            layout=layout,
            region_shape=shape,
            packed_layout=packed_layout,
        )
