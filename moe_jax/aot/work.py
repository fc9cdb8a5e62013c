"""What a step of a model has to compute and to read, counted from its shapes: an analytic count, nothing is measured.

A device's share follows from the shardings: a parameter that is split is multiplied by each device in part, one that is
replicated by each device in whole. Counted are matrix products; experts are counted as if all were equally likely. Norms,
softmax, routing and activations between products are left out, so every number is a lower bound of what a program does.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.families.decoder import GroupedQueryAttention, LatentAttention
from moe_jax.models import CausalLM
from moe_jax.models.cache import cached_features
from moe_jax.models.latent_attention import latent_space_is_cheaper
from moe_jax.models.parameter_sources import parameter_shardings, parameter_sources
from moe_jax.parallel import axis_tuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the model."""

    batch_size: int
    """Rows."""
    new_tokens: int
    """Tokens of each row that are computed."""
    cache_length: int
    """Slots of each row in the cache; attention multiplies with all of them."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.batch_size * self.new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one device, or all together, has to do in a step."""

    flops: float = 0.0
    """Multiplications and additions of matrix products."""
    weight_bytes: float = 0.0
    """Bytes of parameters to be read; of experts those that some token is expected to choose."""
    cache_bytes: float = 0.0
    """Bytes of the cache to be read and written."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=self.flops + other.flops,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            cache_bytes=self.cache_bytes + other.cache_bytes,
        )

    @property
    def memory_bytes(self) -> float:
        """Bytes that travel between device memory and the device."""
        return self.weight_bytes + self.cache_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parameter:
    """A parameter of the model with what one device holds of it."""

    source: str
    """Its path in `parameter_shapes`; of a stacked one, that of the first layer."""
    size: int
    local_size: int
    nbytes: int
    """Bytes of the part that one device holds."""

    @property
    def leaf(self) -> str:
        """Its path within its layer."""
        return self.source.split(".", 2)[2] if self.source.startswith("layers.") else self.source

    @property
    def layer(self) -> int:
        return int(self.source.split(".")[1])

    @property
    def share(self) -> float:
        """The part that one device holds."""
        return self.local_size / self.size


def parameters_per_device(model: CausalLM) -> int:
    """Bytes of parameters that each device holds."""
    return sum(parameter.nbytes for parameter in _parameters(model))


def cache_per_device(model: CausalLM, *, batch_size: int, cache_length: int) -> int:
    """Bytes of the cache that each device holds."""
    return sum(
        batch_size
        * cache_length
        * math.prod(features)
        * model.dtype.itemsize
        // _cache_splits(model, features, batch_size)
        for layer in model.decoder.layers
        for features in cached_features(layer.attention)
    )


def work_per_device(model: CausalLM, step: Step) -> Work:
    """What each device has to do in `step`, the fullest one where shares differ."""
    tokens = _per_batch_position(model, step.batch_size) * step.new_tokens
    rows = _per_batch_position(model, step.batch_size)
    expert_tokens = -(-step.tokens // _positions_without_experts(model))
    total = Work()
    for parameter in _parameters(model):
        total += _parameter_work(model, parameter, step, tokens=tokens, rows=rows, expert_tokens=expert_tokens)
    for parameter in _parameters(model):
        if parameter.leaf == "attention.o_proj.kernel":
            repeats = _layers_like(model, parameter.layer)
            total += Work(flops=repeats * parameter.share * _attention_flops(model, parameter.layer, step, rows=rows))
    return total + Work(cache_bytes=_cache_traffic(model, step))


def model_flops(model: CausalLM, step: Step) -> float:
    """Products of the whole model in `step`, each counted once however many devices compute it."""
    total = 0.0
    for parameter in _parameters(model):
        whole = dataclasses.replace(parameter, local_size=parameter.size)
        work = _parameter_work(model, whole, step, tokens=step.tokens, rows=step.batch_size, expert_tokens=step.tokens)
        total += work.flops
        if parameter.leaf == "attention.o_proj.kernel":
            repeats = _layers_like(model, parameter.layer)
            total += repeats * _attention_flops(model, parameter.layer, step, rows=step.batch_size)
    return total


def _parameter_work(
    model: CausalLM, parameter: _Parameter, step: Step, *, tokens: int, rows: int, expert_tokens: int
) -> Work:
    """Reading one parameter, and multiplying what one device holds of it."""
    match parameter.leaf:
        case "embedder.embedding":
            if not model.decoder.tie_word_embeddings:  # a table from which rows are taken
                width = model.decoder.hidden_size * parameter.nbytes // max(1, parameter.local_size)
                return Work(weight_bytes=tokens * width)
            return Work(flops=2 * rows * parameter.local_size, weight_bytes=parameter.nbytes)
        case "lm_head.kernel":
            return Work(flops=2 * rows * parameter.local_size, weight_bytes=parameter.nbytes)
        case "feed_forward.routed_experts.gate_up_proj" | "feed_forward.routed_experts.down_proj":
            config = _mixture(model, parameter.layer)
            chosen = config.top_k / (config.num_experts + config.router.num_zero_experts)
            touched = 1 - (1 - chosen) ** expert_tokens
            flops = 2 * expert_tokens * chosen * parameter.local_size
            return Work(flops=flops, weight_bytes=touched * parameter.nbytes)
        case "attention.kv_b_proj.kernel":
            attention = model.decoder.layers[parameter.layer].attention
            multiplied = rows * step.cache_length
            if isinstance(attention, LatentAttention) and _in_latent_space(attention, step):
                multiplied = tokens
            return Work(flops=2 * multiplied * parameter.local_size, weight_bytes=parameter.nbytes)
        case leaf if leaf.endswith(".kernel") or leaf == "feed_forward.router.weight":
            return Work(flops=2 * tokens * parameter.local_size, weight_bytes=parameter.nbytes)
        case _:
            return Work(weight_bytes=parameter.nbytes)


def _attention_flops(model: CausalLM, layer: int, step: Step, *, rows: int) -> float:
    """Scores and weighted values of all heads of one layer."""
    attention = model.decoder.layers[layer].attention
    pairs = rows * step.new_tokens * step.cache_length * attention.num_heads
    if isinstance(attention, GroupedQueryAttention):
        return 2 * pairs * 2 * attention.head_dim
    if _in_latent_space(attention, step):
        return 2 * pairs * 2 * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    # Keys are wider than values, which are padded to the keys' width.
    width = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    return 2 * pairs * (width + max(width, attention.v_head_dim))


def _in_latent_space(attention: LatentAttention, step: Step) -> bool:
    return latent_space_is_cheaper(attention, queries=step.new_tokens, keys=step.cache_length)


def _cache_traffic(model: CausalLM, step: Step) -> float:
    """Attention reads every slot, and new tokens are written."""
    held = cache_per_device(model, batch_size=step.batch_size, cache_length=step.cache_length)
    return held * (1 + step.new_tokens / step.cache_length)


def _parameters(model: CausalLM) -> Iterator[_Parameter]:
    sources, shardings = parameter_sources(model), parameter_shardings(model)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        local = math.prod(shardings[path].shard_shape(variable.shape))
        source = sources[path]
        yield _Parameter(
            source=source if isinstance(source, str) else source[0],
            size=math.prod(variable.shape),
            local_size=local,
            nbytes=local * jax.numpy.dtype(variable.dtype).itemsize,
        )


def _layers_like(model: CausalLM, layer: int) -> int:
    """How many layers are stacked in the block whose first layer is `layer`."""
    return next(
        stack.segment.repeats
        for stack in model.stacks
        if stack.segment.start <= layer < stack.segment.start + stack.segment.period
    )


def _mixture(model: CausalLM, layer: int) -> MoEConfig:
    config = model.decoder.layers[layer].feed_forward
    if not isinstance(config, MoEConfig):
        raise TypeError(f"layer {layer} has no experts but a {type(config).__name__}")
    return config


def _per_batch_position(model: CausalLM, batch_size: int) -> int:
    """Rows that one device computes outside of the experts."""
    if model.partitioning is None:
        return batch_size
    axes = model.partitioning.batch_axes_for(batch_size)
    return batch_size // model.partitioning.size(axes)


def _positions_without_experts(model: CausalLM) -> int:
    """Into how many parts tokens are split whose experts are whole: positions of data axes that hold the same experts."""
    if model.partitioning is None:
        return 1
    mixtures: list[Any] = [
        stack.blocks[position].feed_forward for stack in model.stacks for position in stack.moe_positions
    ]
    parallel = mixtures[0].config.parallel if mixtures else None
    if parallel is None:
        return 1
    splitting = axis_tuple(parallel.data_axis) + axis_tuple(parallel.sequence_axis)
    holding = axis_tuple(parallel.expert_axis) + axis_tuple(parallel.tensor_axis)
    return model.partitioning.size(tuple(axis for axis in splitting if axis not in holding))


def _cache_splits(model: CausalLM, features: tuple[int, ...], batch_size: int) -> int:
    """Into how many parts a layer's cache is split."""
    if model.partitioning is None:
        return 1
    axes = [axis for dimension in model.partitioning.cache_spec(features, batch_size) for axis in axis_tuple(dimension)]
    return model.partitioning.size(tuple(axes))
