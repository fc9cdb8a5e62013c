"""`inspect`: what is in a checkpoint, from its headers alone."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from moe_jax.config import MoEConfig

from .checkpoint import Checkpoint
from .hub import resolve_source
from .huggingface import HuggingFaceCheckpoint
from .manifest import PARTS_FOLDER
from .opening import open_checkpoint
from .tensor_plan import is_expert_leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What `inspect` found."""

    folder: Path
    kind: str
    """"huggingface" or "converted"."""
    family: str
    """`model_type`."""
    architecture: str
    form: str
    """Form of the (original) Hugging Face checkpoint: per_expert or fused."""
    quantization: str | None
    """Method by which the (original) weights are quantized."""
    layers: int
    moe_layers: int
    hidden_size: int
    vocab_size: int
    experts: int
    """Routed experts per MoE layer; 0 without MoE layers."""
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    """Width of the shared experts, 0 without any."""
    tied_embeddings: bool
    max_positions: int
    parameters: int
    """Numbers in all parameters."""
    active_parameters: int
    """Numbers that take part in computing one token: of the routed experts only those chosen."""
    dtypes: Mapping[str, int]
    """Dtype in which parameters are read -> how many numbers."""
    nbytes: int
    """Bytes of all files that hold weights."""
    files: int
    """How many there are."""
    dropped: Mapping[str, str]
    """Tensors left out on purpose -> why."""


def inspect(path: str | os.PathLike[str]) -> Summary:
    """What the checkpoint at `path` (a Hugging Face folder, a hub id, a converted folder) holds.

    Raises:
        CheckpointError: It isn't whole; every problem is listed.
    """
    folder = resolve_source(path)
    return summarize(open_checkpoint(folder), folder)


def summarize(reader: Checkpoint, folder: Path) -> Summary:
    """The summary of an open checkpoint."""
    decoder = reader.decoder
    moe = cast(MoEConfig, decoder.layers[decoder.moe_layers[0]].feed_forward) if decoder.moe_layers else None
    parameters = active = 0
    dtypes: dict[str, int] = {}
    for path, shape in reader.shapes.items():
        count = math.prod(shape)
        parameters += count
        active += count // shape[0] * moe.top_k if moe is not None and is_expert_leaf(path) else count
        name = reader.dtype_of(path).name
        dtypes[name] = dtypes.get(name, 0) + count
    converted = not isinstance(reader, HuggingFaceCheckpoint)
    parts = (folder / PARTS_FOLDER).rglob("*")
    files = [file for file in parts if file.is_file()] if converted else list(reader.files)
    return Summary(
        folder=folder,
        kind="converted" if converted else "huggingface",
        family=reader.family.model_type,
        architecture=reader.family.architecture,
        form=reader.form,
        quantization=reader.quantization,
        layers=len(decoder.layers),
        moe_layers=len(decoder.moe_layers),
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        experts=0 if moe is None else moe.num_experts,
        experts_per_token=0 if moe is None else moe.top_k,
        expert_intermediate_size=0 if moe is None else moe.intermediate_size,
        shared_intermediate_size=moe.shared_experts.intermediate_size if moe is not None and moe.shared_experts else 0,
        tied_embeddings=decoder.tie_word_embeddings,
        max_positions=decoder.max_positions,
        parameters=parameters,
        active_parameters=active,
        dtypes=dtypes,
        nbytes=sum(file.stat().st_size for file in files),
        files=len(files),
        dropped=reader.dropped,
    )
