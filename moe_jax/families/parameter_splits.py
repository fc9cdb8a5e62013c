"""Which dimension of each parameter several devices can share, and what the units are that must stay whole.

One table for all families: a model splits its parameters by it, and a conversion chunks them by it, so that a host can
read just its share. Parameters that are not in it (norms, routers, the projections into a latent) are small, or every
device needs them whole.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Units = Literal["experts", "query heads", "key/value heads", "intermediate features", "vocabulary entries"]
"""What is dealt out; the parameters of one unit stay together."""


class Split(NamedTuple):
    """How one parameter may be split."""

    dimension: int
    """The axis of the parameter (of one layer) that is split."""
    units: Units
    """What that axis consists of."""


_MLP: Mapping[str, Split] = {
    "gate_proj.kernel": Split(1, "intermediate features"),
    "gate_proj.bias": Split(0, "intermediate features"),
    "up_proj.kernel": Split(1, "intermediate features"),
    "up_proj.bias": Split(0, "intermediate features"),
    "down_proj.kernel": Split(0, "intermediate features"),
}

PARAMETER_SPLITS: Mapping[str, Split] = {
    "embedder.embedding": Split(0, "vocabulary entries"),
    "lm_head.kernel": Split(1, "vocabulary entries"),
    "attention.q_proj.kernel": Split(1, "query heads"),
    "attention.q_proj.bias": Split(0, "query heads"),
    "attention.k_proj.kernel": Split(1, "key/value heads"),
    "attention.k_proj.bias": Split(0, "key/value heads"),
    "attention.v_proj.kernel": Split(1, "key/value heads"),
    "attention.v_proj.bias": Split(0, "key/value heads"),
    "attention.sinks": Split(0, "query heads"),
    "attention.o_proj.kernel": Split(0, "query heads"),
    "attention.q_b_proj.kernel": Split(1, "query heads"),
    "attention.kv_b_proj.kernel": Split(1, "query heads"),  # latent attention: every query head has keys of its own
    **{f"feed_forward.{name}": split for name, split in _MLP.items()},
    **{f"feed_forward.shared_experts.{name}": split for name, split in _MLP.items()},
    "feed_forward.routed_experts.gate_up_proj": Split(0, "experts"),
    "feed_forward.routed_experts.gate_up_bias": Split(0, "experts"),
    "feed_forward.routed_experts.down_proj": Split(0, "experts"),
    "feed_forward.routed_experts.down_bias": Split(0, "experts"),
}
"""Path of a parameter, without its layer, -> how it may be split."""

_LAYER = re.compile(r"layers\.\d+\.")


def split_of(path: str) -> Split | None:
    """How the parameter at `path` of `moe_jax.families.parameter_shapes` may be split; None: not at all."""
    return PARAMETER_SPLITS.get(_LAYER.sub("", path))
