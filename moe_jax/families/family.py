"""The row that describes one model family: nothing but data."""

import dataclasses
from collections.abc import Callable, Mapping

from moe_jax.families.decoder import Decoder
from moe_jax.families.names import CheckpointForm, ExpertNames
from moe_jax.families.settings import HFConfig, Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family as Hugging Face knows it."""

    model_type: str
    """`model_type` of its `config.json`."""
    architecture: str
    """Class in `architectures` of its `config.json`."""
    build_decoder: Callable[[HFConfig], Decoder]
    """Reads a `config.json`; raises ValueError naming a key that changes the result and isn't supported."""
    names: Mapping[str, str]
    """Template of our path -> template of the tensor's name, for everything but the routed experts' weights."""
    fused_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where the fused form uses other names than `names`."""
    experts: ExpertNames = ExpertNames()
    """Names and layout of the routed experts' weights."""
    native_form: CheckpointForm = "per_expert"
    """The form of published checkpoints."""
    dropped: tuple[str, ...] = ()
    """Regular expressions (full match) of tensors that are left out on purpose."""
    prediction_layers: Setting = 0
    """How many layers for multi-token prediction its checkpoints have, at most, after the decoder's: they are left out."""
