"""Which layers of a model are balanced, and where the arrays of their experts are in any tree of arrays."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from moe_jax.experts import EXPERT_PARAMETERS
from moe_jax.load_balancing.exchange import ExpertSharding
from moe_jax.models.layer_stack import LayerStack
from moe_jax.runner import MoERunner

Path = tuple[str | int, ...]
"""Names of attributes, keys and indices that lead to a module or an array."""


class BalancedLayers(NamedTuple):
    """One Mixture-of-Experts layer, or several that are stacked to be scanned."""

    path: Path
    """Where the module is in the model."""
    rows: tuple[int, ...]
    """Its layers, as they are counted in `MoEAux.physical_load` of the model."""
    is_stacked: bool
    """Its arrays have a leading axis of layers."""

    def module(self, model: nnx.Module) -> MoERunner:
        """The layer itself."""
        node: Any = model
        for name in self.path:
            node = node[name] if isinstance(name, int) else getattr(node, name)
        return node


def find_layers(model: nnx.Module) -> tuple[BalancedLayers, ...]:
    """Every `MoERunner` of a model.

    Rows are counted in the order of the layers in a `LayerStack`, stack after stack, as a `CausalLM` reports them, and
    in the order of `nnx.iter_modules` in other models. A `MoERunner` whose arrays have one axis more, the first, is a stack of
    layers, as `nnx.vmap` makes them: they are counted in their order in it.

    Raises:
        ValueError: there is none, or one has several axes of layers.
    """
    found: list[BalancedLayers] = []
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(model))
    stacks = [(path, module) for path, module in modules if isinstance(module, LayerStack)]
    count = 0
    for path, stack in sorted(stacks, key=lambda entry: entry[0]):
        per_group = len(stack.moe_positions)
        for place, position in enumerate(stack.moe_positions):
            rows = tuple(count + place + per_group * repeat for repeat in range(stack.segment.repeats))
            found.append(BalancedLayers((*path, "blocks", position, "feed_forward"), rows, is_stacked=True))
        count += stack.num_moe_layers
    known = {layers.path for layers in found}
    for path, module in modules:
        if isinstance(module, MoERunner) and path not in known:
            num_layers, is_stacked = _stacked_layers(path, module)
            found.append(BalancedLayers(path, tuple(range(count, count + num_layers)), is_stacked))
            count += num_layers
    if not found:
        raise ValueError(f"the model must have a MoERunner, got {type(model).__name__} without any")
    return tuple(found)


def _stacked_layers(path: Path, layer: MoERunner) -> tuple[int, bool]:
    """How many layers a `MoERunner` is, and whether its arrays have an axis of them."""
    *stacked, _, _, _ = layer.routed_experts.down_proj.shape
    if len(stacked) > 1:
        raise ValueError(
            f"layers may be stacked along one axis, got {len(stacked)} axes of sizes {', '.join(map(str, stacked))} in "
            f"{'.'.join(map(str, path)) or 'the model'}"
        )
    return (stacked[0], True) if stacked else (1, False)


class ExpertArrays(NamedTuple):
    """A leaf of a tree that has one entry for each physical expert of `layers`."""

    leaf: int
    """Its number among the leaves of the flattened tree."""
    layers: BalancedLayers
    name: str
    """The one of `EXPERT_PARAMETERS` that it is, or belongs to."""


def find_expert_arrays(tree: Any, layers: tuple[BalancedLayers, ...], num_physical: int) -> Iterator[ExpertArrays]:
    """The leaves of `tree` that have to move with the experts: weights, gradients, or an optimizer's moments.

    A leaf belongs to a layer if its path contains the layer's and goes on with `routed_experts`; of several such layers, to that
    with the longest path, for one layer's path may be the end of another's. Scalars do not move.

    Raises:
        ValueError: such a leaf lacks the axis of experts.
    """
    for found in _find_leaves(tree, layers, "routed_experts"):
        leaf, axis = found.value, int(found.layers.is_stacked)
        if found.name not in EXPERT_PARAMETERS or jax.numpy.size(leaf) == 1:
            continue
        if leaf.ndim <= axis or leaf.shape[axis] != num_physical:
            raise ValueError(
                f"axis {axis} of {found.path} must be that of the {num_physical} physical experts, got shape {leaf.shape}"
            )
        yield ExpertArrays(found.leaf, found.layers, found.name)


class TableLeaf(NamedTuple):
    """A leaf of a tree that is a placement table of `layers`."""

    leaf: int
    """Its number among the leaves of the flattened tree."""
    layers: BalancedLayers
    name: str
    """What it is called in a `ReplicaMap`."""


def find_tables(tree: Any, layers: tuple[BalancedLayers, ...]) -> Iterator[TableLeaf]:
    """The leaves of `tree` that say where the experts of a model are: it is the state of one, or holds that."""
    for found in _find_leaves(tree, layers, "replicas"):
        yield TableLeaf(found.leaf, found.layers, found.name)


def check_tables(tree: Any, layers: tuple[BalancedLayers, ...], placement: Int[np.ndarray, "L P"]) -> None:
    """Raise ValueError if such leaves say another thing than `placement`: moved like the model's, these experts would be lost."""
    for found in _find_leaves(tree, layers, "replicas"):
        if found.name != "physical_to_logical":
            continue
        if not np.array_equal(stacked_rows(found.value, found.layers), placement[list(found.layers.rows)]):
            raise ValueError(f"{found.path} must be the placement of the model, to move along with it, got another one")


class _Found(NamedTuple):
    """A leaf of a part of a layer."""

    leaf: int
    layers: BalancedLayers
    name: str
    """What it is called in the part."""
    path: str
    value: Any


def _find_leaves(tree: Any, layers: tuple[BalancedLayers, ...], part: str) -> Iterator[_Found]:
    """The leaves whose path contains that of a layer, of several the longest one, and goes on with `part`."""
    longest_first = sorted(layers, key=lambda group: len(group.path), reverse=True)
    for index, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        names = tuple(_name(key) for key in keys)
        for group in longest_first:
            start = _position_of((*group.path, part), names)
            if start is not None:
                name = str(names[start + len(group.path) + 1])
                yield _Found(index, group, name, ".".join(map(str, names)), leaf)
                break


def partition_of(model: nnx.Module, arrays: ExpertArrays) -> ExpertSharding:
    """How the layer's own weights of that name are split, known without an array."""
    layer = arrays.layers.module(model)
    if layer.axes is None:
        return ExpertSharding(None, PartitionSpec(), arrays.layers.is_stacked)
    spec = dict(nnx.to_flat_state(layer.partition_specs()))["routed_experts", arrays.name]
    if isinstance(spec, nnx.Variable):
        spec = spec[...]
    return ExpertSharding(
        layer.axes.mesh, PartitionSpec(None, *spec) if arrays.layers.is_stacked else spec, arrays.layers.is_stacked
    )


def stacked_rows(table: Array, layers: BalancedLayers) -> Array:
    """The tables of one layer as those of a stack of one."""
    return table if layers.is_stacked else table[None]


def _name(key: Any) -> str | int:
    """What a key of a path is called: that of an attribute, a dictionary or a sequence."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def _position_of(part: Path, whole: Path) -> int | None:
    """Where `part` first occurs in `whole` without gaps; None where it doesn't."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return start
    return None
