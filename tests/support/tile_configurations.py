"""Every tile configuration that a published model's experts can meet, and a few smaller ones: tuned, or chosen by default."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from aot.gpu_kernels import FEW_TILES, FEW_TILES_TOKENS

from moe_jax.benchmarking.expert_shapes import EXPERT_SHAPES, TOKENS, ExpertShape
from moe_jax.kernels.device import GPU_DEVICES, GpuDevice
from moe_jax.kernels.mosaic_gpu.choice import choose_tiles
from moe_jax.kernels.mosaic_gpu.matmuls import chosen_for_forward
from moe_jax.kernels.mosaic_gpu.tuning import committed_file, read_entries

BFLOAT16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class TileConfiguration:
    """A kernel with its tiles, as it is compiled."""

    device: str
    kernel: str
    """"rows", "rows_gradient", "stream" or "weights_gradient"."""
    projections: int
    output_dtype: str
    tiles: Any

    def __str__(self) -> str:
        sizes = "-".join(f"{field.name}{getattr(self.tiles, field.name)}" for field in dataclasses.fields(self.tiles))
        return f"{self.device}-{self.kernel}-{self.projections}-{self.output_dtype}-{sizes}"


def tile_configurations(device_name: str) -> list[TileConfiguration]:
    """All of them, each once, in an order that does not depend on chance."""
    device = GPU_DEVICES[device_name]
    problems = [*itertools.product(EXPERT_SHAPES.values(), TOKENS), *itertools.product([FEW_TILES], FEW_TILES_TOKENS)]
    chosen = dict.fromkeys(
        configuration
        for shape, tokens in problems
        for configuration in (*_of_fused_moe(shape, tokens, device), *_of_grouped_matmul(shape, tokens, device))
    )
    for entry in read_entries(committed_file(device_name), device_name):
        output_dtypes = ("bfloat16", "float32") if entry.kernel == "weights_gradient" else ("bfloat16",)
        for output_dtype in output_dtypes:
            tuned = TileConfiguration(device_name, entry.kernel, entry.shape.projections, output_dtype, entry.tiles)
            chosen[tuned] = None
    return sorted(chosen, key=str)


def _of_fused_moe(shape: ExpertShape, tokens: int, device: GpuDevice) -> Iterator[TileConfiguration]:
    """Forward; forward that keeps what enters the activation; gradients."""
    H, I, E = shape.hidden_size, shape.intermediate_size, shape.local_experts  # noqa: E741
    P = 2 if shape.activation.is_gated else 1
    num_rows = shape.expected_rows(tokens)
    for weights_shape in ((E, P, I, H), (E, 1, H, I)):
        yield _forward(num_rows, weights_shape, device)
    yield _chosen("rows", num_rows, E, H, I, device, projections=P)
    yield from _gradients(num_rows, E, I, H, device)
    yield from _gradients(num_rows, E, H, P * I, device)


def _of_grouped_matmul(shape: ExpertShape, tokens: int, device: GpuDevice) -> Iterator[TileConfiguration]:
    """Gate and up by one matmul of twice the width; down is as in `fused_moe`."""
    H, I, E = shape.hidden_size, shape.intermediate_size, shape.local_experts  # noqa: E741
    num_rows = shape.expected_rows(tokens)
    yield _forward(num_rows, (E, 1, 2 * I, H), device)
    yield from _gradients(num_rows, E, H, 2 * I, device)


def _forward(num_rows: int, weights_shape: tuple[int, int, int, int], device: GpuDevice) -> TileConfiguration:
    kernel, chosen = chosen_for_forward(num_rows, weights_shape, BFLOAT16, BFLOAT16, device)
    return TileConfiguration(device.name, kernel, weights_shape[1], BFLOAT16.name, chosen.tiles)


def _gradients(
    num_rows: int, num_groups: int, width_in: int, width_out: int, device: GpuDevice
) -> Iterator[TileConfiguration]:
    """Of a matmul from `width_in` to `width_out`."""
    yield _chosen("rows_gradient", num_rows, num_groups, width_out, width_in, device)
    for output_dtype in ("bfloat16", "float32"):
        yield _chosen("weights_gradient", num_rows, num_groups, width_in, width_out, device, output_dtype=output_dtype)


def _chosen(
    kernel: Any,
    num_rows: int,
    num_groups: int,
    width_in: int,
    width_out: int,
    device: GpuDevice,
    *,
    projections: int = 1,
    output_dtype: str = "bfloat16",
) -> TileConfiguration:
    chosen = choose_tiles(
        kernel,
        num_rows=num_rows,
        num_groups=num_groups,
        width_in=width_in,
        width_out=width_out,
        projections=projections,
        dtype=BFLOAT16,
        output_dtype=jnp.dtype(output_dtype),
        device=device,
    )
    return TileConfiguration(device.name, kernel, projections, output_dtype, chosen.tiles)
