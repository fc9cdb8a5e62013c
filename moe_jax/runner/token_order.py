"""The order in which a layer's tokens stand in one list, chosen such that making the list moves no token between devices."""

import dataclasses
import math
from typing import Any, Self

from jaxtyping import Array

from moe_jax.parallel import LayerAxes


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """Leading dimensions `[..., S]` <-> tokens `[T]`.

    Usually row by row. Where sequences are split over devices, too, a device's tokens would not be neighbours in that order; then
    the list goes through the devices first: data position, sequence position, and last the tokens there.
    """

    leading: tuple[int, ...]
    """Leading dimensions of the hidden states."""
    data_blocks: int = 1
    """Data positions, if the list goes through devices."""
    sequence_blocks: int = 1
    """Sequence positions, if the list goes through devices."""

    @classmethod
    def of(cls, leading: tuple[int, ...], axes: LayerAxes | None) -> Self:
        """The order for a layer's axes; row by row where these don't split both dimensions evenly."""
        if axes is None or len(leading) < 2:
            return cls(leading)
        data, sequence = axes.size(axes.data), axes.size(axes.sequence)
        if sequence == 1 or math.prod(leading[:-1]) % data or leading[-1] % sequence:
            return cls(leading)
        return cls(leading, data, sequence)

    def flatten(self, name: str, array: Array | None, trailing_dims: int) -> Any:
        """`[..., *trailing]` -> `[T, *trailing]`; None stays None.

        Raises:
            ValueError: the array `name` has other leading dimensions.
        """
        if array is None:
            return None
        leading = self.leading
        if array.ndim != len(leading) + trailing_dims or array.shape[: len(leading)] != leading:
            raise ValueError(
                f"{name} must have the leading dimensions {leading} of hidden_states, got shape {array.shape}"
            )
        trailing = array.shape[len(leading) :]
        if self.sequence_blocks > 1:
            data, sequence = self.data_blocks, self.sequence_blocks
            rows, length = math.prod(leading[:-1]) // data, leading[-1] // sequence
            array = array.reshape(data, rows, sequence, length, *trailing).swapaxes(1, 2)
        return array.reshape(math.prod(leading), *trailing)

    def unflatten(self, array: Array) -> Array:
        """`[*before, T, D]` -> `[*before, *leading, D]`."""
        before, width = array.shape[:-2], array.shape[-1]
        if self.sequence_blocks > 1:
            data, sequence = self.data_blocks, self.sequence_blocks
            rows, length = math.prod(self.leading[:-1]) // data, self.leading[-1] // sequence
            array = array.reshape(*before, data, sequence, rows, length, width).swapaxes(-4, -3)
        return array.reshape(*before, *self.leading, width)
