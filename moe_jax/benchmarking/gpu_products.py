"""The products of a block, each alone: for what the events of a whole block don't tell.

A kernel that splits the contraction leaves a second pass to XLA, which adds the parts up; in a whole block its time can't be told
from that of other XLA kernels, with which it may be fused. So such a product is measured alone, with its table of tiles made
beforehand: what is not the kernel is then the second pass.

Where there are no events, nothing in a block can be told from the rest. Then all of its products are measured alone, by the clock.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.benchmarking.device_timer import Timing
from moe_jax.benchmarking.expert_contestants import Weights
from moe_jax.benchmarking.expert_work import wave_ceiling
from moe_jax.benchmarking.gpu_cases import Case
from moe_jax.benchmarking.kernel_tuning import Problem, chosen_tiles, kernel_call, problems
from moe_jax.kernels.device import GpuDevice, gpu_device_of
from moe_jax.kernels.mosaic_gpu.schedule import TileTable, aligned_groups
from moe_jax.kernels.mosaic_gpu.stream_kernel import stream_weights
from moe_jax.kernels.mosaic_gpu.tiles import StreamTiles
from moe_jax.kernels.mosaic_gpu.tuning import Tiles

MATMUL_KERNELS = "mosaic_gpu"
"""Part of the names of Mosaic GPU kernels; XLA's own (sorting, gathering, combining) have others."""


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
        return TileTable.of(aligned_groups(sizes), self.problem.layout_rows, self.tiles.rows, "aligned")

    def arguments(self, weights: Weights, sizes: Sequence[np.ndarray], key: Array) -> list[tuple[Any, ...]]:
        """Random rows with these weights, one set for the groups of each of these sizes."""
        matrices, table = weights[f"{self.place}_proj"], jax.jit(self.table)
        assert matrices is not None
        rows, _, _, scale = self.shapes(matrices.dtype)
        rows, scale = jax.random.normal(key, rows.shape, rows.dtype), jnp.ones(scale.shape, scale.dtype)
        return [(rows, matrices, table(jnp.asarray(size, jnp.int32)), scale) for size in sizes]


@dataclasses.dataclass(frozen=True)
class TiledProduct:
    """A product of a forward or backward pass by one of the kernels for many rows, its table of tiles included."""

    problem: Problem
    tiles: Tiles
    device: GpuDevice

    @property
    def place(self) -> str:
        """Such as "rows_gradient of down"."""
        return f"{self.problem.kernel} of {self.problem.place}"

    @property
    def function(self) -> Callable[..., Array]:
        """(rows, cotangent, weights, group sizes) -> result."""
        return kernel_call(self.problem, self.tiles, self.device)

    def shapes(self, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
        """Of the function's arguments."""
        (experts, projections, width_out, width_in), rows = self.problem.weights_shape, self.problem.layout_rows
        describe = jax.ShapeDtypeStruct
        return (
            describe((rows, width_in), dtype),
            describe((rows, projections * width_out), dtype),
            describe(self.problem.weights_shape, dtype),
            describe((experts,), jnp.int32),
        )

    def arguments(self, weights: Weights, sizes: Sequence[np.ndarray], key: Array) -> list[tuple[Any, ...]]:
        """Random rows and cotangents with these weights, one set for the groups of each of these sizes."""
        matrices = weights[f"{self.problem.place}_proj"]
        assert matrices is not None
        rows, cotangent, matrices_shape, _ = self.shapes(matrices.dtype)
        rows, cotangent = (jax.random.normal(key, array.shape, array.dtype) for array in (rows, cotangent))
        matrices = matrices.reshape(matrices_shape.shape)
        return [(rows, cotangent, matrices, jnp.asarray(size, jnp.int32)) for size in sizes]


Product = StreamedProduct | TiledProduct


def products(case: Case) -> list[Product]:
    """Those of a case on the device at hand; none if it has no such kernels."""
    device = gpu_device_of()
    if device is None:
        return []
    return [
        (StreamedProduct if problem.kernel == "stream" else TiledProduct)(
            problem, chosen_tiles(problem, device).tiles, device
        )
        for problem in problems(case.shape, case.tokens, device, backward=case.kind == "backward")
    ]


def streamed_products(case: Case) -> list[StreamedProduct]:
    """Those of a forward pass whose kernel streams the weights."""
    found = products(case) if case.kind == "forward" else ()
    return [product for product in found if isinstance(product, StreamedProduct)]


def split_products(case: Case) -> list[StreamedProduct]:
    """Those of them that need a second pass."""
    return [product for product in streamed_products(case) if product.tiles.splits > 1]


def waves_ceiling(case: Case, sizes: Sequence[np.ndarray]) -> float | None:
    """Largest share of the dense rate that the last waves of a forward pass's tiles allow, for groups of these sizes.

    On average over them, all tiles being taken for full; None if no product of the pass is tiled.
    """
    tiled = [product for product in products(case) if isinstance(product, TiledProduct)]
    if case.kind != "forward" or not tiled or not any(size.sum() for size in sizes):
        return None
    shares = []
    for size in sizes:
        work = time = 0.0
        for product in tiled:
            _, projections, width_out, width_in = product.problem.weights_shape
            rows, columns = product.tiles.rows, product.tiles.columns  # pyright: ignore[reportAttributeAccessIssue]
            tiles = int(np.sum(-(-size // rows))) * -(-width_out // columns)
            share = wave_ceiling(tiles, product.device.multiprocessors)
            work += projections * width_out * width_in
            time += projections * width_out * width_in / (share or 1)
        shares.append(work / time)
    return statistics.mean(shares)


@dataclasses.dataclass(frozen=True)
class MatmulTime:
    """How long a block's products take."""

    seconds: float
    second_pass: float | None
    """Part of it, in seconds; None if it can't be told from the rest."""

    @classmethod
    def by_events(cls, block: Timing, split: Sequence[Timing] | None) -> Self:
        """The kernels of a block and its second passes; the whole block where these aren't known, and at most.

        Args:
            block: of the whole block.
            split: of each product that needs a second pass, alone; None if one could not be measured.
        """
        in_block = block.kernel_seconds(MATMUL_KERNELS)
        second_passes = [_second_pass(timing) for timing in split] if split is not None else [None]
        known = [seconds for seconds in second_passes if seconds is not None]
        if len(known) < len(second_passes):
            return cls(block.seconds, None)
        second_pass = sum(known)
        return cls(min(block.seconds, in_block + second_pass) if in_block else block.seconds, second_pass)

    @classmethod
    def by_clock(cls, block: Timing, alone: Sequence[Timing] | None) -> Self:
        """The sum of a block's products, each measured alone; the whole block where that isn't known, and at most."""
        return cls(min(block.seconds, sum(timing.seconds for timing in alone)) if alone else block.seconds, None)


def _second_pass(product: Timing) -> float | None:
    """What isn't the kernel; None if that can't be told."""
    kernel = product.kernel_seconds(MATMUL_KERNELS)
    return None if kernel is None else max(0.0, product.seconds - kernel)
