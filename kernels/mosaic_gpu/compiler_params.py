"""How kernels are compiled that place their own barriers."""

from jax.experimental.pallas import mosaic_gpu as plgpu

OWN_BARRIERS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True, unsafe_no_auto_barriers=True
)
"""Leaves out the barriers of a warpgroup that Pallas puts around every store to shared memory and before every copy into it.

They make a warpgroup's own reads and writes of the same memory come in order. It is enough (`CompilerParams`) that no warpgroup
both reads and writes a region of memory, copies apart, and that none starts a copy into a region that it has read since its
last barrier. In `rows_kernel.py` and `stream_kernel.py` that is so:

- The pipeline's memory is written by copies and read by wgmma alone; barriers in memory (`filled`, `consumed`), at which every
  thread arrives and waits, pass it on.
- Memory of results is written by a warpgroup and read by copies alone. `wait_smem_to_gmem` before the write and `commit_smem`
  after it each end with a barrier of the warpgroup.
- Memory of biases and of factors of rows is written by copies, which a warpgroup starts at the beginning of a tile, and read by
  it at the end, before it stores the tile's last results: the `commit_smem` of that store is between the reads and the next copy.

`weights_gradient_kernel.py` reads and writes the rows that it masks, so there they stay.
"""
