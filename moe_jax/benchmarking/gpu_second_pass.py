"""The second pass of kernels that split the contraction: XLA adds the parts up, which is part of the product.

In a whole block its time can't be told from that of other XLA kernels, with which it may be fused. So a product that is split
is measured alone, with its table of tiles made beforehand: what is not the kernel is then the second pass.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.benchmarking.expert_contestants import Weights
from moe_jax.benchmarking.gpu_cases import Case
from moe_jax.benchmarking.kernel_tuning import Problem, chosen_tiles, problems
from moe_jax.kernels.device import GpuDevice, gpu_device_of
from moe_jax.kernels.mosaic_gpu.schedule import TileTable, aligned_groups
from moe_jax.kernels.mosaic_gpu.stream_kernel import stream_weights
from moe_jax.kernels.mosaic_gpu.tiles import StreamTiles


@dataclasses.dataclass(frozen=True)
class StreamedProduct:
    """One of a block's two products, by the kernel that streams weights."""

    problem: Problem
    tiles: StreamTiles
    device: GpuDevice

    @property
    def place(self) -> str:
        """Which of the two: "gate_up" or "down"."""
        return self.problem.place

    @property
    def function(self) -> Callable[..., Array]:
        """(rows, weights, table, row_scale) -> result, as the block calls it."""
        experts, projections, width_out, width_in = self.problem.weights_shape
        is_first = self.place == "gate_up"

        def multiply(rows: Array, weights: Array, table: TileTable, row_scale: Array) -> Array:
            return stream_weights(
                rows,
                weights.reshape(experts * projections, width_out, width_in),
                table,
                tiles=self.tiles,
                projections=projections,
                activation=self.problem.shape.activation if is_first else None,
                row_scale=None if is_first else row_scale,
                output_dtype=rows.dtype,
                device=self.device,
            )

        return multiply

    def shapes(self, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
        """Of the function's arguments."""
        (experts, projections, width_out, width_in), rows = self.problem.weights_shape, self.problem.layout_rows
        matrices = (
            (experts, projections, width_out, width_in) if self.place == "gate_up" else (experts, width_out, width_in)
        )
        describe = jax.ShapeDtypeStruct
        return (
            describe((rows, width_in), dtype),
            describe(matrices, dtype),
            jax.eval_shape(self.table, describe((experts,), jnp.int32)),
            describe((rows,), jnp.float32),
        )

    def table(self, sizes: Array) -> TileTable:
        """The tiles for groups of these sizes."""
        return TileTable.of(aligned_groups(sizes), self.problem.layout_rows, self.tiles.rows)

    def arguments(self, weights: Weights, sizes: Sequence[np.ndarray], key: Array) -> list[tuple[Any, ...]]:
        """Random rows with these weights, one set for the groups of each of these sizes."""
        matrices, table = weights[f"{self.place}_proj"], jax.jit(self.table)
        assert matrices is not None
        rows, _, _, scale = self.shapes(matrices.dtype)
        rows, scale = jax.random.normal(key, rows.shape, rows.dtype), jnp.ones(scale.shape, scale.dtype)
        return [(rows, matrices, table(jnp.asarray(size, jnp.int32)), scale) for size in sizes]


def streamed_products(case: Case) -> list[StreamedProduct]:
    """The products of a forward pass on the device at hand, if its kernel streams the weights; none otherwise."""
    device = gpu_device_of()
    if device is None or case.kind != "forward":
        return []
    return [
        StreamedProduct(problem, chosen_tiles(problem, device).tiles, device)
        for problem in problems(case.shape, case.tokens, device, backward=False)
        if problem.kernel == "stream"
    ]


def split_products(case: Case) -> list[StreamedProduct]:
    """Those of them that need a second pass."""
    return [product for product in streamed_products(case) if product.tiles.splits > 1]
