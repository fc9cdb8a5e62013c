"""Activations of an expert: name and limits -> function of gate and up (spec section 8).

Expert weights keep gate and up apart (`[E, 2, I, H]`), and a checkpoint whose rows are interleaved is untangled once, at
conversion. An activation here therefore always receives two arrays, so `swigluoai` and `swigluoai_uninterleave` differ in
nothing but the defaults of their parameters.

Source: vLLM `fused_moe/activation.py` (`MoEActivation`, `apply_moe_activation`).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ALIASES = {"gelu_pytorch_tanh": "gelu_tanh"}
_NOT_GATED_SUFFIX = "_no_mul"


def _silu(gate: Array, up: Array, activation: "Activation") -> Array:
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    return jax.nn.silu(gate) * up


def _gelu(gate: Array, up: Array, activation: "Activation") -> Array:
    return jax.nn.gelu(gate, approximate=False) * up


def _gelu_tanh(gate: Array, up: Array, activation: "Activation") -> Array:
    return jax.nn.gelu(gate, approximate=True) * up


def _relu2(gate: Array, up: Array, activation: "Activation") -> Array:
    return jnp.square(jnp.maximum(gate, 0)) * up


def _swigluoai(gate: Array, up: Array, activation: "Activation") -> Array:
    limit, alpha, beta = activation.filled("limit", "alpha", "beta")
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + beta)


def _swiglustep(gate: Array, up: Array, activation: "Activation") -> Array:
    (limit,) = activation.filled("limit")
    return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)


@dataclasses.dataclass(frozen=True)
class _Form:
    """One named activation: its formula and which parameters it takes."""

    formula: Callable[[Array, Array, "Activation"], Array]
    """Function of gate and up (both float32 or wider) and of the activation that holds the parameters."""
    defaults: dict[str, float] = dataclasses.field(default_factory=dict)
    """Parameters that it needs, and their values when they are not given."""
    optional: frozenset[str] = frozenset()
    """Parameters that change the formula when given and may be absent."""
    mandatory: frozenset[str] = frozenset()
    """Parameters that have no default and must be given."""

    @property
    def accepted(self) -> frozenset[str]:
        return frozenset(self.defaults) | self.optional | self.mandatory


_GATED_FORMS = {
    "silu": _Form(_silu, optional=frozenset({"limit"})),
    "gelu": _Form(_gelu),
    "gelu_tanh": _Form(_gelu_tanh),
    "relu2": _Form(_relu2),
    "swigluoai": _Form(_swigluoai, defaults={"limit": 7.0, "alpha": 1.702, "beta": 1.0}),
    "swigluoai_uninterleave": _Form(_swigluoai, defaults={"alpha": 1.0, "beta": 0.0}, mandatory=frozenset({"limit"})),
    "swiglustep": _Form(_swiglustep, defaults={"limit": 7.0}),
}
_WITHOUT_MUL = ("silu", "gelu", "gelu_tanh", "relu2")
_FORMS = _GATED_FORMS | {f"{name}{_NOT_GATED_SUFFIX}": _Form(_GATED_FORMS[name].formula) for name in _WITHOUT_MUL}

ACTIVATIONS: tuple[str, ...] = tuple(_FORMS)
"""Legal names; `gelu_pytorch_tanh` is accepted as an alias of `gelu_tanh`."""


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation by name, with its parameters: hashable, and complete once built (defaults are filled in).

    Gated ones are functions of `(gate, up)`, those ending in `_no_mul` of `gate` alone. With L = limit:

    ========================  ==========================================================  =========================
    name                      formula                                                     parameters
    ========================  ==========================================================  =========================
    `silu`                    silu(g) u; with a limit: silu(min(g, L)) clip(u, -L, L)     limit optional
    `gelu`                    g (1 + erf(g / sqrt 2)) / 2 u                               none
    `gelu_tanh`               g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) / 2 u           none
    `relu2`                   relu(g)^2 u                                                 none
    `swigluoai`               g' sigmoid(alpha g') (u' + beta), g' = min(g, L),           limit 7, alpha 1.702,
                              u' = clip(u, -L, L)                                         beta 1
    `swigluoai_uninterleave`  the same formula                                            limit mandatory, alpha 1,
                                                                                          beta 0
    `swiglustep`              min(silu(g), L) clip(u, -L, L): clamped after the silu      limit 7
    `silu_no_mul`, `gelu_no_mul`, `gelu_tanh_no_mul`, `relu2_no_mul`: the same with u = 1, no parameters
    ========================  ==========================================================  =========================

    Raises:
        ValueError: unknown name, a parameter that the activation does not take, a missing mandatory limit, a limit that is not
            positive, or a parameter that is not finite. `situ` is refused by name: its formula is not published.
    """

    name: str
    """One of `ACTIVATIONS`, or an alias, which is replaced by the name it stands for."""
    limit: float | None = None
    """Clamp limit L."""
    alpha: float | None = None
    """Slope inside the sigmoid."""
    beta: float | None = None
    """Added to the clamped up projection."""

    def __post_init__(self) -> None:
        name = _ALIASES.get(self.name, self.name) if isinstance(self.name, str) else None
        if name == "situ":
            raise ValueError(f"activation 'situ' is not supported, its formula is unpublished; {_legal_names()}")
        if name not in _FORMS:
            raise ValueError(f"unknown activation {self.name!r}; {_legal_names()}")
        object.__setattr__(self, "name", name)
        form = _FORMS[name]
        for parameter in ("limit", "alpha", "beta"):
            value = getattr(self, parameter)
            if value is not None and parameter not in form.accepted:
                taken = ", ".join(sorted(form.accepted)) or "no parameters"
                raise ValueError(f"activation {name!r} takes {taken}, got {parameter}={value}")
            if value is None and parameter in form.mandatory:
                raise ValueError(f"activation {name!r} needs {parameter}, got None")
            if value is None and parameter in form.defaults:
                object.__setattr__(self, parameter, form.defaults[parameter])
        if self.limit is not None and not (self.limit > 0 and math.isfinite(self.limit)):
            raise ValueError(f"limit of activation {name!r} must be positive and finite, got {self.limit}")
        for parameter in ("alpha", "beta"):
            value = getattr(self, parameter)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{parameter} of activation {name!r} must be finite, got {value}")

    @classmethod
    def of(cls, activation: "str | Activation") -> "Activation":
        """The activation itself, or the one of that name with its default parameters.

        Raises:
            ValueError: there is no activation of that name, or it is no name.
        """
        return activation if isinstance(activation, Activation) else Activation(activation)

    def filled(self, *parameters: str) -> tuple[float, ...]:
        """The values of parameters that this activation has."""
        return tuple(getattr(self, parameter) for parameter in parameters)

    @property
    def is_gated(self) -> bool:
        """Whether it multiplies by an up projection (the first axis of `gate_up_proj[e]` is then 2, otherwise 1)."""
        return not self.name.endswith(_NOT_GATED_SUFFIX)

    def without_mul(self) -> "Activation":
        """The activation without the multiplication by up; itself if it has none.

        Raises:
            ValueError: it has no such form (only silu, gelu, gelu_tanh and relu2 do, without a limit).
        """
        if not self.is_gated:
            return self
        if self.name not in _WITHOUT_MUL or self.limit is not None:
            raise ValueError(
                f"{self} has no form without multiplication; only {', '.join(_WITHOUT_MUL)} have, unlimited"
            )
        return Activation(f"{self.name}{_NOT_GATED_SUFFIX}")

    def __call__(
        self, gate: Float[Array, "*shape"], up: Float[Array, "*shape"] | None = None
    ) -> Float[Array, "*shape"]:
        """Apply it in float32 (or wider) and return the dtype of `gate`.

        Args:
            gate: gate projection; the only input of a `_no_mul` activation.
            up: up projection; needed exactly if the activation `is_gated`.
        """
        if (up is not None) != self.is_gated:
            needed = "gate and up" if self.is_gated else "gate alone"
            raise ValueError(
                f"activation {self.name!r} is a function of {needed}, got up={'given' if up is not None else None}"
            )
        wide = jnp.promote_types(gate.dtype, jnp.float32)
        factor = jnp.ones((), wide) if up is None else up.astype(wide)
        return _FORMS[self.name].formula(gate.astype(wide), factor, self).astype(gate.dtype)


def _legal_names() -> str:
    return f"legal are {', '.join(ACTIVATIONS)} and the alias {', '.join(_ALIASES)}"
