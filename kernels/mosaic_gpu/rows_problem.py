"""What the kernels that multiply rows by their group's matrix are given, on Hopper and on Blackwell."""

import dataclasses
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..activations import Activation
from ..device import GpuDevice
from .ref import Ref
from .tiles import RowTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsProblem:
    """What is static in the body of a kernel; see `rows_product.multiply_rows`."""

    tiles: RowTiles
    projections: int
    contract: Literal["in", "out"]
    activation: Activation | None
    keep_projected: bool
    zero_groups: bool
    exact_rows: bool
    width_in: int
    """The contracted width, whichever axis of the weights that is."""
    width_out: int
    output_dtype: jnp.dtype
    device: GpuDevice

    @property
    def num_blocks(self) -> int:
        """One per multiprocessor."""
        return self.device.multiprocessors

    @property
    def steps(self) -> int:
        """Of the pipeline, for one tile."""
        return pl.cdiv(self.width_in, self.tiles.depth)

    @property
    def num_columns(self) -> int:
        """Tiles side by side."""
        return pl.cdiv(self.width_out, self.tiles.columns)

    def outputs(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what is written, by name: "result", and "projected" if it is to be kept."""
        outputs = {"result": jax.ShapeDtypeStruct((num_rows, self.width_out), self.output_dtype)}
        if self.keep_projected:
            shape = num_rows, self.projections, self.width_out
            outputs["projected"] = jax.ShapeDtypeStruct(shape, self.output_dtype)
        return outputs


class Tile(NamedTuple):
    """One output tile; rows as in `TileTable`."""

    column: Array
    """Index of its columns."""
    group: Array
    row: Array
    first: Array
    last: Array

    @classmethod
    def of(cls, named: dict[str, Ref], entry: Array, column: Array) -> Self:
        """The tile of an entry of the table and of a tile's columns."""
        return cls(column, *(named[name][entry] for name in ("group", "row", "first", "last")))
