"""The load balancer of a model: record in the step, rearrange between steps."""

import contextlib
import warnings
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from moe_jax.experts.replicas import ReplicaMap
from moe_jax.load_balancing.config import EplbConfig
from moe_jax.load_balancing.exchange import ExpertSharding, move_in_place
from moe_jax.load_balancing.gradients import placement_of, sum_replica_gradients
from moe_jax.load_balancing.layers import (
    BalancedLayers,
    ExpertArrays,
    check_tables,
    find_expert_arrays,
    find_layers,
    find_tables,
)
from moe_jax.load_balancing.moves import Moves, plan_moves
from moe_jax.load_balancing.report import Rearrangement
from moe_jax.load_balancing.state import (
    EplbState,
    after_rearrangement,
    initial_state,
    is_rearrangement_due,
    record_load,
    window_load,
)
from moe_jax.placement import (
    LoadStatistics,
    compute_logical_maps,
    load_statistics,
    logical_load,
    rank_load,
    rebalance_experts,
)
from moe_jax.runner import MoERunner

_Known = dict[int, tuple[Array, Array]]
"""What has moved, by identity of arrays: where each one is now, and that it is there. Trees may share arrays: an optimizer that
holds its model does, and an average that starts as the model's own weights. These move once, and stay shared."""


class ExpertLoadBalancer:
    """Keeps the ranks of a model's Mixture-of-Experts layers evenly loaded while it trains or serves.

    Holds sizes and paths only. What is measured lives in an `EplbState`, which belongs to the step like an optimizer's
    state, and the placement in the layers' `replicas`.

    Attributes:
        config: when to rearrange.
        layers: the layers that are balanced; `BalancedLayers.rows` is their order in loads.
        num_layers, num_experts, num_physical, num_ranks, num_groups: sizes, the same for all layers.
        num_nodes: machines; 1, with a warning, where `config.num_nodes` doesn't divide the ranks (spec 5.6).
    """

    def __init__(self, model: nnx.Module, config: EplbConfig | None = None):
        """Find the layers of `model`: a `CausalLM`, a `MoERunner`, or any module that has some, alone or stacked to be scanned.

        Layers without redundant experts get placement tables, so that their experts can change places, too.

        Raises:
            ValueError: there are no such layers, or they have different sizes.
        """
        self.config = EplbConfig() if config is None else config
        self.layers = find_layers(model)
        axes = self.layers[0].module(model).axes
        self._mesh = None if axes is None else axes.mesh
        self.num_layers = sum(len(layers.rows) for layers in self.layers)
        sizes = {_sizes(layers.module(model)) for layers in self.layers}
        if len(sizes) > 1:
            raise ValueError(
                "layers that are balanced together must have equal numbers of (experts, physical experts, ranks, "
                f"routing groups), got {', '.join(map(str, sorted(sizes)))}"
            )
        self.num_experts, self.num_physical, self.num_ranks, self.num_groups = sizes.pop()
        self.num_nodes = self.config.num_nodes
        if self.num_ranks % self.num_nodes:
            warnings.warn(
                f"num_nodes={self.num_nodes} doesn't divide the {self.num_ranks} ranks of the experts, so placements take "
                "them for ranks of one machine",
                stacklevel=2,
            )
            self.num_nodes = 1
        for layers in self.layers:
            layer = layers.module(model)
            if layer.replicas is None:
                layer.replicas = _identity_placement(layers, self.num_experts, self._mesh)

    def init(self) -> EplbState:
        """A state in which nothing is recorded, on every device of the layers' mesh."""
        state = initial_state(self.config, self.num_layers, self.num_physical)
        return state if self._mesh is None else jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))

    def record(
        self,
        state: EplbState,
        physical_load: Int[Array, "L P"] | Int[Array, "P"],
        *,
        is_dummy: Bool[Array, ""] | bool = False,
    ) -> EplbState:
        """Inside the jitted step: remember its load. See `record_load`."""
        return record_load(state, physical_load, is_dummy=is_dummy)

    def sum_replica_gradients(self, model: nnx.Module, gradients: Any) -> Any:
        """Inside the jitted training step, before the optimizer. See `sum_replica_gradients`."""
        return sum_replica_gradients(model, gradients, self.layers)

    def should_rearrange(self, state: EplbState) -> bool:
        """Between steps: whether the interval is over. Waits for the step that made `state`."""
        return bool(is_rearrangement_due(state, self.config))

    def statistics(self, state: EplbState) -> LoadStatistics:
        """Balance of the ranks over the recorded steps."""
        return load_statistics(rank_load(np.asarray(window_load(state), np.float64), self.num_ranks))

    def physical_to_logical(self, model: nnx.Module) -> Int[np.ndarray, "L P"]:
        """The placement now."""
        placement = np.empty((self.num_layers, self.num_physical), np.int32)
        for layers in self.layers:
            placement[list(layers.rows)] = placement_of(model, layers).physical_to_logical[...]
        return placement

    def rearrange(self, model: nnx.Module, state: EplbState, *others: Any) -> tuple[Any, ...]:
        """Between steps: choose a placement for the recorded load, and move weights and tables, so that no output changes.

        Every process of a distributed run must call this in the same step; all come to the same placement, from the same
        counts.

        Args:
            model: changed in place; its old weight arrays are given up.
            state: what was recorded.
            others: what has to move along: an `nnx.Optimizer` or a copy of the model (changed in place), or any tree of arrays in
                which the paths of the expert weights occur, such as an optax state (given up; the new one is returned).

        Returns:
            The state, a `Rearrangement`, and `others`.

        Raises:
            ValueError: nothing has been recorded.
        """
        if not int(state.num_recorded):
            raise ValueError("a rearrangement needs recorded load, got a state with num_recorded = 0")
        old = self.physical_to_logical(model)
        measured = np.asarray(window_load(state), np.float64)
        logical = logical_load(measured, old, self.num_experts)
        new = rebalance_experts(
            logical, self.num_physical, self.num_groups, self.num_nodes, self.num_ranks, old
        ).physical_to_logical
        moves, *moved = self.place(model, new, *others)
        report = Rearrangement(
            num_ranks=self.num_ranks,
            logical_load=logical,
            measured_load=measured,
            old_physical_to_logical=old,
            new_physical_to_logical=new,
            sent=moves.sent,
            copied=moves.copied,
        )
        return after_rearrangement(state), report, *moved

    def place(self, model: nnx.Module, physical_to_logical: Int[np.ndarray, "L P"], *others: Any) -> tuple[Any, ...]:
        """Move the experts of `model` and `others` to a given placement; see `rearrange`.

        Returns:
            The `Moves`, and `others`.

        Raises:
            ValueError: the placement has another shape, or an expert without a slot, or an array that should move lacks the axis
                of experts, or a copy of the model has another placement or none; nothing has moved then.
            TypeError: an array that should move is on no device; nothing has moved then.
        """
        old, new = self.physical_to_logical(model), np.asarray(physical_to_logical)
        moves = plan_moves(old, new, self.num_ranks)
        compute_logical_maps(new, self.num_experts)  # refuses experts without a slot while theirs still hold them
        for tree in others:
            self._check_can_follow(tree, old)
        known: _Known = {}
        self._move(model, moves, known)
        for layers in self.layers:
            table = new[list(layers.rows)]
            placement_of(model, layers).replace(table if layers.is_stacked else table[0])
        return moves, *(self._move(tree, moves, known, model) for tree in others)

    def _check_can_follow(self, tree: Any, placement: Int[np.ndarray, "L P"]) -> None:
        """Raise ValueError or TypeError unless the experts of `tree` are at `placement` and can move."""
        if isinstance(tree, (nnx.Module, nnx.Optimizer)):
            graph: Any = tree  # an optimizer holds modules, too
            for path, layer in nnx.iter_modules(graph):
                is_balanced = any(path[len(path) - len(layers.path) :] == layers.path for layers in self.layers)
                if isinstance(layer, MoERunner) and is_balanced and layer.replicas is None:
                    raise ValueError(
                        f"the layer {'.'.join(map(str, path)) or 'itself'} of what moves along must have placement tables: copy "
                        "a model after its ExpertLoadBalancer was made, which adds them"
                    )
            tree = nnx.state(tree)
        leaves = jax.tree.leaves(tree)
        for entry in self._expert_arrays(tree):
            if not isinstance(leaves[entry.leaf], jax.Array):
                raise TypeError(
                    f"what moves between devices must be a jax.Array, got {type(leaves[entry.leaf]).__name__} for {entry.name}"
                )
        check_tables(tree, self.layers, placement)

    def _expert_arrays(self, tree: Any) -> list[ExpertArrays]:
        """Which leaves of a tree of arrays move."""
        return list(find_expert_arrays(tree, self.layers, self.num_physical))

    def _move(self, tree: Any, moves: Moves, known: _Known, placed: nnx.Module | None = None) -> Any:
        """`tree` with its expert arrays moved: a new tree, or the same module.

        Args:
            tree: the model, or what moves along.
            moves: what goes where.
            known: learns what has moved.
            placed: the model, once it is at its new placement: the tables in `tree` become like its own.
        """
        if isinstance(tree, (nnx.Module, nnx.Optimizer)):
            nnx.update(tree, self._move(nnx.state(tree), moves, known, placed))
            return tree
        leaves, structure = jax.tree.flatten(tree)
        found = self._expert_arrays(tree)
        unmoved = {id(leaves[entry.leaf]): entry for entry in found if id(leaves[entry.leaf]) not in known}
        arrays = tuple(leaves[entry.leaf] for entry in unmoved.values())
        shardings = tuple(
            ExpertSharding.of(array, is_stacked=entry.layers.is_stacked)
            for array, entry in zip(arrays, unmoved.values(), strict=True)
        )
        sources = tuple(moves.source[list(entry.layers.rows)] for entry in unmoved.values())
        # The caller's current mesh may have other axis types: a model computes with Auto axes, whatever those of its mesh are.
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            moved = move_in_place(arrays, sources, shardings=shardings)
        for old, new in zip(arrays, moved, strict=True):
            known |= {id(old): (old, new), id(new): (new, new)}
        for entry in found:
            leaves[entry.leaf] = known[id(leaves[entry.leaf])][1]
        if placed is not None:
            for entry in find_tables(tree, self.layers):
                table, array = getattr(placement_of(placed, entry.layers), entry.name)[...], leaves[entry.leaf]
                leaves[entry.leaf] = jax.device_put(np.asarray(table), array.sharding if array.committed else None)
        return jax.tree.unflatten(structure, leaves)


def _sizes(layer: Any) -> tuple[int, int, int, int]:
    """Experts, physical experts, ranks and routing groups of a layer."""
    config, axes = layer.config, layer.axes
    group_limit = config.router.group_limit
    return (
        config.num_experts,
        config.num_physical_experts,
        1 if axes is None else axes.size(axes.expert),
        1 if group_limit is None else group_limit.num_groups,
    )


def _identity_placement(layers: BalancedLayers, num_experts: int, mesh: Mesh | None) -> ReplicaMap:
    """Every expert in its own slot, in every layer; on all devices, as tables are that a layer has from the start."""
    slots = np.arange(num_experts)
    replicas = ReplicaMap(np.tile(slots, (len(layers.rows), 1)) if layers.is_stacked else slots, num_experts)
    if mesh is not None:
        nnx.update(replicas, jax.device_put(nnx.state(replicas), NamedSharding(mesh, PartitionSpec())))
    return replicas
