"""Model families as data: one row each, found by the `model_type` of a Hugging Face `config.json`."""

from moe_jax.families.decoder import Decoder
from moe_jax.families.family import Family
from moe_jax.families.parameters import parameter_shapes
from moe_jax.families.registry import FAMILIES, get_family

__all__ = ["FAMILIES", "Decoder", "Family", "get_family", "parameter_shapes"]
