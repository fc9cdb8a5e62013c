"""Calling a kernel whose body finds its references by name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from .ref import Ref
from .tile_order import BLOCK


def call_kernel(
    body: Callable[[dict[str, Ref]], None],
    *,
    operands: Mapping[str, Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    num_blocks: int,
    num_warpgroups: int,
    compiler_params: plgpu.CompilerParams,
) -> dict[str, Array]:
    """The outputs of a kernel of one block per multiprocessor, by name.

    Args:
        body: gets references to operands, outputs and scratch by their names; its own name is that of the kernel.
        operands: arrays that are read.
        outputs: shapes and dtypes of what is written.
        scratch: types of a block's own memory, and of its barriers.
        num_blocks: along the grid's axis `tile_order.BLOCK`.
        num_warpgroups: of a block, along the axis "warpgroup".
        compiler_params: how it is compiled.
    """

    @functools.wraps(body)
    def with_names(*refs: Ref, **scratch: Ref) -> None:
        body(dict(zip((*operands, *outputs), refs, strict=True)) | scratch)

    results = plgpu.kernel(
        with_names,
        out_type=tuple(outputs.values()),
        grid=(num_blocks,),
        grid_names=(BLOCK,),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        scratch_types=dict(scratch),
        compiler_params=compiler_params,
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))
