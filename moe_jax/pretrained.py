"""From a checkpoint to a model and back: `from_pretrained` and `save_pretrained`."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from moe_jax.assembly import Index, assemble
from moe_jax.checkpoints import (
    Checkpoint,
    CheckpointError,
    InMemoryCheckpoint,
    Progress,
    open_checkpoint,
    resolve_source,
    write_converted,
)
from moe_jax.checkpoints.conversion import read_as_written
from moe_jax.checkpoints.dtypes import MAIN_PARAMETER, weight_dtype
from moe_jax.config import ParallelConfig
from moe_jax.device_layouts import Home
from moe_jax.experts.replicas import ReplicaMap
from moe_jax.families.parameters import FLOAT32_PARAMETERS
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import (
    StatePath,
    expert_placements,
    parameter_homes,
    parameter_sources,
)
from moe_jax.parallel import parallel_of
from moe_jax.runner.physical_experts import initial_replicas


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    parallel: ParallelConfig | None = None,
    num_redundant_experts: int = 0,
    fuse_shared_experts: bool = False,
    implementation: str | None = None,
    recompute_layers: bool = False,
    revision: str | None = None,
) -> CausalLM:
    """Load a model.

    Weights are read block by block and go straight to the devices that need them, so host memory stays small. On a mesh,
    each host reads only what its own devices hold (see `docs/multihost.md` for what that takes of the folder).

    Args:
        source: a Hugging Face folder, a converted folder, or a hub id ("owner/name").
        dtype: dtype of parameters and computation, bfloat16, float16 or float32; None keeps what each tensor is stored in,
            and computes in the dtype of the embedding table. The router's correction bias is float32 in any case.
        mesh: devices to spread the model over; None: the default device. Its axes may be Auto or Explicit; the model
            computes with Auto ones, see `CausalLM`.
        parallel: how `mesh` splits the model, see `CausalLM`; None: as its axes' names "data", "expert" and "tensor" say,
            and if it has none of those, experts are split over all its axes.
        num_redundant_experts: extra slots in every MoE layer, filled with copies of experts, for load balancing.
        fuse_shared_experts: compute shared experts among the routed ones, see `MoEConfig`; parameters are the same.
        implementation: implementation of the expert computation; None chooses by device and shape.
        recompute_layers: for training: gradients keep of every layer only its input, see `CausalLM`.
        revision: branch, tag or commit of a model on the hub; None: its newest.

    Raises:
        ValueError: `parallel` is given without `mesh`, only some of the mesh's axes have names that say what they split,
            the mesh cannot split the experts evenly, or `fuse_shared_experts` of a model whose shared experts are unlike its
            routed ones.
        moe_jax.checkpoints.CheckpointError: there is no such checkpoint, it isn't whole, its family or one of its
            settings isn't supported, `dtype` is none of those above, or a value is beyond its range.
    """
    dtype = None if dtype is None else weight_dtype(dtype)
    if parallel is not None and mesh is None:
        raise ValueError(f"parallel needs mesh=, got None with {parallel}")
    if parallel is None:
        parallel = ParallelConfig() if mesh is None else parallel_of(mesh)
    folder = resolve_source(source, revision)
    reader = open_checkpoint(folder)
    create = functools.partial(
        CausalLM,
        reader.decoder,
        dtype=reader.dtype_of(MAIN_PARAMETER) if dtype is None else dtype,
        parallel=parallel,
        mesh=mesh,
        num_redundant_experts=num_redundant_experts,
        fuse_shared_experts=fuse_shared_experts,
        implementation=implementation,
        recompute_layers=recompute_layers,
        hf_config=reader.config,
        source_folder=folder.absolute(),  # the process may change its folder before the model is saved
    )

    model = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0)))
    sources, homes = parameter_sources(model), parameter_homes(model)
    values, slots = _initial_placements(model, homes)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path in sources:
            experts = slots.get(path[:5]) if "routed_experts" in path else None
            values[path] = _load(reader, sources[path], variable.shape, homes[path], dtype, experts)
    graph, state = nnx.split(model)
    loaded = [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _initial_placements(
    model: CausalLM, homes: Mapping[StatePath, Home]
) -> tuple[dict[StatePath, jax.Array], dict[StatePath, np.ndarray]]:
    """Tables of the expert placement by their path, and per stack of MoE layers which expert each slot holds."""
    tables, slots = {}, {}
    for path in expert_placements(model):
        _, stack, _, position, _ = path
        mixture: Any = model.stacks[stack].blocks[position].feed_forward
        initial: Any = initial_replicas(mixture.config, mixture.axes)
        slots[path] = np.asarray(initial.physical_to_logical[...])
        for rest, variable in nnx.to_flat_state(nnx.state(initial)):
            table = np.asarray(variable[...])
            stacked = np.broadcast_to(table, (model.stacks[stack].segment.repeats, *table.shape))
            whole = (*path, "replicas", *rest)
            tables[whole] = jax.device_put(stacked, homes[whole])
    return tables, slots


def save_pretrained(model: CausalLM, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model as a converted folder, which `from_pretrained` and `moe-jax export` read.

    Tokenizer and generation settings are copied from the folder that the model was loaded from, `model.source_folder`. If
    that is gone, a UserWarning says that they are missing: the model is saved all the same, because it may be the result
    of long training. Of several processes, all must call this: they bring the parameters together, a part at a time, and
    process 0 writes them. What keeps it from writing is raised on all of them.

    Args:
        model: a model that knows its `config.json` (`hf_config`), as those of `from_pretrained` do.
        folder: where to write; it must not exist.
        overwrite: replace a model that is there, unless `model.source_folder` is that or lies in it, and discard an
            interrupted conversion to `folder`.

    Raises:
        ValueError: the model doesn't know its `config.json`.
        moe_jax.checkpoints.CheckpointError: the folder exists or may not be replaced, an interrupted conversion to it is
            waiting to be finished, or it cannot be written.
    """
    if model.hf_config is None:
        raise ValueError("the model has no hf_config: build it with hf_config= to say what its config.json holds")
    reader = _ModelReader(config=model.hf_config, leaves=_leaves(model), folder=_source_folder(model, folder))
    if jax.process_count() == 1:
        write_converted(reader, folder, overwrite=overwrite)
    else:
        _write_together(reader, folder, overwrite)


def _source_folder(model: CausalLM, target: str | os.PathLike[str]) -> Path | None:
    """Where the model's tokenizer and generation settings are; None, with a warning, if that folder is gone."""
    if model.source_folder is None or os.path.isdir(model.source_folder):
        return None if model.source_folder is None else Path(model.source_folder)
    if jax.process_index() == 0:
        warnings.warn(
            f"{model.source_folder}, which the model was loaded from, is no longer there: {os.fspath(target)} gets no "
            "tokenizer and no generation_config.json. Copy them into it, or set model.source_folder to a folder that has "
            "them and save again with overwrite=True",
            stacklevel=3,
        )
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ModelReader(InMemoryCheckpoint):
    """A model as a checkpoint that knows what was read of it."""

    asked: list[str] = dataclasses.field(default_factory=list)
    """Path of each slice that was to be read, in this order."""
    answered: list[str] = dataclasses.field(default_factory=list)
    """Of each that was."""

    def read_slice(self, path: str, start: int, stop: int, dtype: Any = None) -> np.ndarray:
        """See `Checkpoint.read_slice`."""
        self.asked.append(path)
        values = super().read_slice(path, start, stop, dtype)
        self.answered.append(path)
        return values


def _write_together(reader: _ModelReader, folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Every process reads all parameters in the same order, which gathers them; process 0 also writes them.

    It says twice whether it can: before anything is read, and at the end. In between the others wait for its part of every
    read, so that it reads on whatever happens to what it writes. A read that fails does so on all of them.
    """
    if jax.process_index() > 0:
        _raise_what_process_0_says()
        read_as_written(reader)
        _raise_what_process_0_says()
        return
    has_begun = False

    def begin(_: Progress) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            _say_from_process_0("")

    try:
        write_converted(reader, folder, overwrite=overwrite, progress=begin)
    except Exception as error:
        if reader.asked != reader.answered:
            raise
        if has_begun:
            read_as_written(reader, done=len(reader.answered))
        _say_from_process_0(str(error) or repr(error))
        raise
    _say_from_process_0("")


def _raise_what_process_0_says() -> None:
    if problem := _say_from_process_0(""):
        raise CheckpointError(problem)


def _say_from_process_0(text: str) -> str:
    """The text of process 0, on every process; all must call this."""
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    # Of the other processes only the shape counts, and arrays without an element are not worth sending.
    sent = data if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).decode() if length else ""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One layer's parameter, perhaps inside a stacked array; values leave the devices when a part of it is asked for."""

    array: jax.Array
    layer: int | None = None
    """Index into the first axis of a stacked array."""
    slots: np.ndarray | None = None
    """Of expert weights: the slot of each expert; None: they are in order."""

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.array.shape if self.layer is None else self.array.shape[1:]
        return shape if self.slots is None else (len(self.slots), *shape[1:])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.slots is None:
            return self._on_host(index)
        return np.concatenate([self._on_host((run, *index[1:])) for run in _runs(self.slots[index[0]])])

    def _on_host(self, index: tuple[slice, ...]) -> np.ndarray:
        layer = () if self.layer is None else (slice(self.layer, self.layer + 1),)
        bounds = [part.indices(size) for part, size in zip((*layer, *index), self.array.shape, strict=False)]
        bounds += [(0, size, 1) for size in self.array.shape[len(bounds) :]]
        sharding = self.array.sharding
        everywhere = None
        if not self.array.is_fully_addressable and isinstance(sharding, NamedSharding):
            everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        starts, sizes = [start for start, _, _ in bounds], tuple(stop - start for start, stop, _ in bounds)
        part = np.asarray(_window(everywhere)(self.array, starts, sizes))
        return part if self.layer is None else part[0]


@functools.cache
def _window(sharding: Sharding | None) -> Callable[..., jax.Array]:
    """`f(array, starts, sizes)`: a part of an array with this sharding, compiled once for all layers of a stack."""
    return jax.jit(jax.lax.dynamic_slice, static_argnums=2, out_shardings=sharding)


def _leaves(model: CausalLM) -> Mapping[str, _Leaf]:
    """The parameters of single layers, by their path in `parameter_shapes`."""
    placements = {path: _slots_of_experts(tables) for path, tables in expert_placements(model).items()}
    sources, leaves = parameter_sources(model), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path not in sources:
            continue
        source, array = sources[path], variable[...]
        slots = placements.get(path[:5]) if "routed_experts" in path else None
        if isinstance(source, str):
            leaves[source] = _Leaf(array)
        else:
            leaves |= {
                name: _Leaf(array, layer, None if slots is None else slots[layer]) for layer, name in enumerate(source)
            }
    return leaves


def _slots_of_experts(tables: ReplicaMap) -> np.ndarray:
    """`[layers, E]`: of each layer's experts the first slot that holds a copy."""
    return np.asarray(tables.logical_to_physical[...])[..., 0]


def _load(
    reader: Checkpoint,
    source: str | tuple[str, ...],
    shape: tuple[int, ...],
    home: Home,
    dtype: np.dtype | None,
    experts: np.ndarray | None,
) -> jax.Array:
    """One parameter of the model, stacked from `source` if that names several layers.

    `experts` says which expert each slot of expert weights holds; None: they are in order.
    """
    if isinstance(source, str):
        dtype = _dtype_in_memory(reader, (source,), dtype)
        read_whole = functools.partial(reader.read_region, source, dtype=dtype)
        return assemble(shape, home, dtype, read_whole, stacked=False)
    dtype = _dtype_in_memory(reader, source, dtype)

    def read_layer(name: str, index: Index) -> np.ndarray:
        if experts is None:
            return reader.read_region(name, index, dtype)
        slots, *rest = index
        return np.concatenate([reader.read_region(name, (run, *rest), dtype) for run in _runs(experts[slots])])

    def read(index: Index) -> np.ndarray:
        layers, *rest = index
        return np.stack([read_layer(name, tuple(rest)) for name in source[layers]])

    return assemble(shape, home, dtype, read, stacked=True)


def _runs(numbers: np.ndarray) -> Iterator[slice]:
    """`numbers` as slices of consecutive ones, in their order."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        yield slice(int(run[0]), int(run[-1]) + 1)


def _dtype_in_memory(reader: Checkpoint, names: tuple[str, ...], dtype: np.dtype | None) -> np.dtype:
    """What is asked for, or the smallest dtype that holds all of `names` as they are stored."""
    if names[0].rpartition(".")[2] in FLOAT32_PARAMETERS:
        return np.dtype(np.float32)
    if dtype is not None:
        return dtype
    return functools.reduce(jnp.promote_types, (reader.dtype_of(name) for name in names))
