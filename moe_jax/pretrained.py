"""From a checkpoint to a model and back: `from_pretrained` and `save_pretrained`."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from moe_jax.assembly import Index, assemble
from moe_jax.checkpoints import Checkpoint, InMemoryCheckpoint, open_checkpoint, resolve_source, write_converted
from moe_jax.config import ParallelConfig
from moe_jax.families.parameters import FLOAT32_PARAMETERS
from moe_jax.models import CausalLM
from moe_jax.models.parameter_sources import parameter_shardings, parameter_sources
from moe_jax.parallel import parallel_of

EMBEDDING = "embedder.embedding"
"""The parameter whose dtype a model computes in, unless it is told another."""


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    parallel: ParallelConfig | None = None,
    implementation: str | None = None,
) -> CausalLM:
    """Load a model.

    Weights are read block by block and go straight to the devices that need them, so host memory stays small. On a mesh,
    each host reads only what its own devices hold (see `docs/multihost.md` for what that takes of the folder).

    Args:
        source: a Hugging Face folder, a converted folder, or a hub id ("owner/name").
        dtype: dtype of parameters and computation; None keeps what each tensor is stored in, and computes in the dtype
            of the embedding table. The router's correction bias is float32 in any case.
        mesh: devices to spread the model over; None: the default device. Its axes may be Auto or Explicit; the model
            computes with Auto ones, see `CausalLM`.
        parallel: how `mesh` splits the model, see `CausalLM`; None: as its axes' names "data", "expert" and "tensor" say,
            and if it has none of those, experts are split over all its axes.
        implementation: implementation of the expert computation; None chooses by device and shape.

    Raises:
        ValueError: `parallel` is given without `mesh`, only some of the mesh's axes have names that say what they split,
            or the mesh cannot split the experts evenly.
        moe_jax.checkpoints.CheckpointError: there is no such checkpoint, it isn't whole, or its family or one of its
            settings isn't supported.
    """
    if parallel is not None and mesh is None:
        raise ValueError(f"parallel needs mesh=, got None with {parallel}")
    if parallel is None:
        parallel = ParallelConfig() if mesh is None else parallel_of(mesh)
    reader = open_checkpoint(resolve_source(source))
    create = functools.partial(
        CausalLM,
        reader.decoder,
        dtype=reader.dtype_of(EMBEDDING) if dtype is None else dtype,
        parallel=parallel,
        mesh=mesh,
        implementation=implementation,
        hf_config=reader.config,
        source_folder=reader.folder,
    )

    model = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0)))
    sources, shardings = parameter_sources(model), parameter_shardings(model)
    graph, state = nnx.split(model)
    loaded = [
        (path, variable.replace(_load(reader, sources[path], variable.shape, shardings[path], dtype)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def save_pretrained(model: CausalLM, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model as a converted folder, which `from_pretrained` and `moe-jax export` read.

    Tokenizer and generation settings are copied from the folder that the model was loaded from.

    Args:
        model: a model that knows its `config.json` (`hf_config`), as those of `from_pretrained` do.
        folder: where to write; it must not exist.
        overwrite: replace what is there.

    Raises:
        ValueError: the model doesn't know its `config.json`.
        moe_jax.checkpoints.CheckpointError: the folder exists, or cannot be written.
    """
    if model.hf_config is None:
        raise ValueError("the model has no hf_config: build it with hf_config= to say what its config.json holds")
    source_folder = None if model.source_folder is None else Path(model.source_folder)
    reader = InMemoryCheckpoint(config=model.hf_config, leaves=_leaves(model), folder=source_folder)
    write_converted(reader, folder, overwrite=overwrite)


@dataclasses.dataclass(frozen=True)
class _StackedLeaf:
    """One layer's parameter inside a stacked array; its values leave the device only when a part of it is asked for."""

    stacked: jax.Array
    layer: int

    @property
    def dtype(self) -> np.dtype:
        return self.stacked.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked.shape[1:]

    def __getitem__(self, index: tuple[slice, ...]) -> jax.Array:
        return self.stacked[(self.layer, *index)]


def _leaves(model: CausalLM) -> Mapping[str, jax.Array | _StackedLeaf]:
    """The parameters of single layers, by their path in `parameter_shapes`."""
    sources, leaves = parameter_sources(model), {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        source, array = sources[path], variable[...]
        if isinstance(source, str):
            leaves[source] = array
        else:
            leaves |= {name: _StackedLeaf(array, layer) for layer, name in enumerate(source)}
    return leaves


def _load(
    reader: Checkpoint, source: str | tuple[str, ...], shape: tuple[int, ...], sharding: Sharding, dtype: Any
) -> jax.Array:
    """One parameter of the model, stacked from `source` if that names several layers."""
    if isinstance(source, str):
        dtype = _dtype_in_memory(reader, (source,), dtype)
        read_whole = functools.partial(reader.read_region, source, dtype=dtype)
        return assemble(shape, sharding, dtype, read_whole, stacked=False)
    dtype = _dtype_in_memory(reader, source, dtype)

    def read(index: Index) -> np.ndarray:
        layers, *rest = index
        return np.stack([reader.read_region(name, tuple(rest), dtype) for name in source[layers]])

    return assemble(shape, sharding, dtype, read, stacked=True)


def _dtype_in_memory(reader: Checkpoint, names: tuple[str, ...], dtype: Any) -> np.dtype:
    """What is asked for, or the smallest dtype that holds all of `names` as they are stored."""
    if names[0].rpartition(".")[2] in FLOAT32_PARAMETERS:
        return np.dtype(np.float32)
    if dtype is not None:
        return jnp.dtype(dtype)
    return functools.reduce(jnp.promote_types, (reader.dtype_of(name) for name in names))
