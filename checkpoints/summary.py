"""`inspect`: what is in a checkpoint, from its headers alone."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from moe_jax.config import MoEConfig

from .converted import ConvertedCheckpoint
from .file_names import PARTS_FOLDER
from .hub import resolve_headers
from .huggingface import HuggingFaceCheckpoint
from .opening import open_headers
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
    """Bytes of all files that hold weights; of files that are on the hub alone, without their headers."""
    files: int
    """How many there are."""
    dropped: Mapping[str, str]
    """Tensors left out on purpose -> why."""


def inspect(path: str | os.PathLike[str], *, revision: str | None = None) -> Summary:
    """What the checkpoint at `path` holds, from headers and sizes of files; no value is read.

    Args:
        path: A Hugging Face folder, a converted folder, or a hub id. Of a model on the hub whose weights are not in the
            local cache, only `config.json` and headers are downloaded.
        revision: Branch, tag or commit of a model on the hub; None: its newest.

    Raises:
        CheckpointError: It isn't whole; every problem is listed.
    """
    folder, headers = resolve_headers(path, revision)
    if headers is not None:
        reader = HuggingFaceCheckpoint(folder, headers)
        return summarize(reader, sum(entry.nbytes for entry in headers.values()), len(reader.files))
    reader = open_headers(folder)
    if isinstance(reader, ConvertedCheckpoint):
        reader.check_files()
        files = [file for file in (folder / PARTS_FOLDER).rglob("*") if file.is_file()]
    else:
        files = reader.files
    return summarize(reader, sum(file.stat().st_size for file in files), len(files))


def summarize(reader: ConvertedCheckpoint | HuggingFaceCheckpoint, nbytes: int, files: int) -> Summary:
    """The summary of an open checkpoint whose weights are in so many bytes of so many files."""
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
    return Summary(
        folder=reader.folder,
        kind="converted" if isinstance(reader, ConvertedCheckpoint) else "huggingface",
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
        nbytes=nbytes,
        files=files,
        dropped=reader.dropped,
    )
