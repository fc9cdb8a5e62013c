"""Where the tokens of a batch stand: their order within their rows, which of them are padding, and who sees whom."""

import dataclasses
from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NOWHERE = jnp.iinfo(jnp.int32).max
"""Order of padding: after everything, so that no token sees it, and outside of any cache, so that it isn't stored."""


class Visibility(NamedTuple):
    """Which keys each token sees: itself and earlier ones. It is kept as places, for as a mask it would be large."""

    queries: Int[Array, "B S"]
    """Index of each token among the real tokens of its row."""
    keys: Int[Array, "B T"]
    """The same for the keys; one row if it is the same for all."""
    window: int | None
    """How many keys a token sees in all, itself included; None: all earlier ones."""

    def mask(self) -> Bool[Array, "B 1 S T"]:
        """True where a token sees a key."""
        distance = self.queries[:, :, None] - self.keys[:, None, :]
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        return visible[:, None]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """The new tokens of a batch, in relation to those that a cache holds already.

    Tokens are counted per row, from the row's first real token on. Left padding, right padding and rows of different
    length are therefore one case: padding has no place in this order.
    """

    order: Int[Array, "B S"]
    """Index of each token among the real tokens of its row, cached ones included; `NOWHERE` for padding."""
    is_real: Bool[Array, "B S"] | None
    """False at padding; None when there is none."""
    cached_slots: int | None
    """Slots per row of the cache, or None without one. Slot i holds the row's i-th real token."""

    @classmethod
    def of(
        cls,
        input_ids: Int[Array, "B S"],
        attention_mask: Int[Array, "B S"] | None,
        *,
        lengths: Int[Array, "B"] | None = None,
        cached_slots: int | None = None,
    ) -> Self:
        """The sequence of a call.

        Args:
            input_ids: the new tokens.
            attention_mask: 1 (or True) at real tokens of `input_ids`, 0 at padding; None: all are real.
            lengths: how many real tokens the cache holds per row.
            cached_slots: slots per row of that cache.

        Raises:
            ValueError: the mask has another shape than the tokens.
        """
        offset = 0 if lengths is None else lengths[:, None]
        if attention_mask is None:
            order = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32) + offset, input_ids.shape)
            return cls(order, None, cached_slots)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape {input_ids.shape} of input_ids (the new tokens only, with a cache "
                f"too), got {attention_mask.shape}"
            )
        is_real = attention_mask.astype(bool)
        order = jnp.cumsum(is_real, axis=1, dtype=jnp.int32) - 1 + offset
        return cls(jnp.where(is_real, order, NOWHERE), is_real, cached_slots)

    @property
    def positions(self) -> Int[Array, "B S"]:
        """Default positions: the order; 0 at padding, where they don't matter."""
        return self.order if self.is_real is None else jnp.where(self.is_real, self.order, 0)

    @property
    def new_tokens(self) -> Int[Array, "B"]:
        """Real tokens per row."""
        batch, length = self.order.shape
        return jnp.full(batch, length, jnp.int32) if self.is_real is None else jnp.sum(self.is_real, 1, dtype=jnp.int32)

    def visibility(self, window: int | None) -> Visibility:
        """Which keys each token sees, at most `window` of them: the slots of the cache, or without one the tokens themselves.

        Slots that aren't filled yet come later than every token, and so does padding.
        """
        if self.cached_slots is None:
            return Visibility(self.order, self.order, window)
        return Visibility(self.order, jnp.arange(self.cached_slots, dtype=jnp.int32)[None], window)
