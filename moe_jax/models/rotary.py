"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its stretched variants."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.families.decoder import LinearScaling, Rope, YarnScaling


class Rotation(NamedTuple):
    """Angles by which the tokens of a batch are rotated, as float32 cosines and sines."""

    cos: Float[Array, "B S R/2"]
    sin: Float[Array, "B S R/2"]


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Angle per position of each rotated pair, `[rotary_dim / 2]`, computed in float32 as when checkpoints are trained."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / np.float32(factor)
        case YarnScaling() as yarn:
            kept = _share_kept(rope, yarn)
            return frequencies / np.float32(yarn.factor) * (1 - kept) + frequencies * kept


def rotation(rope: Rope, positions: Int[Array, "B S"]) -> Rotation:
    """Cosines and sines of the angles at `positions`, times YaRN's attention factor."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: Float[Array, "B S N D"], rope: Rope, by: Rotation) -> Float[Array, "B S N D"]:
    """Rotate the first `rope.rotary_dim` dimensions of every head, in float32; the rest passes through.

    Interleaved pairs come out as two halves: queries and keys are permuted alike, which keeps their products.
    """
    rotated, rest = x[..., : rope.rotary_dim].astype(jnp.float32), x[..., rope.rotary_dim :]
    if rope.interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    halves = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(half.astype(x.dtype) for half in halves), rest], axis=-1)


def _share_kept(rope: Rope, yarn: YarnScaling) -> np.ndarray:
    """How much of each frequency YaRN keeps: 1 for fast ones, 0 for slow ones, a ramp between (section 3.2 of the paper)."""

    def dimension_of(turns: float) -> float:
        """The pair (as a dimension index) that turns this often over the original length."""
        ratio = yarn.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 0.001
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return 1 - np.clip(ramp, 0, 1)
