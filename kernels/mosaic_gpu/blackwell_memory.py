"""How the Blackwell kernels divide the memory of a multiprocessor: what their tile sizes have in common."""

TENSOR_MEMORY_LANES = 128
"""Rows of an accumulator, which one instruction multiplies."""
TENSOR_MEMORY_COLUMNS = 512
"""Float32 columns of tensor memory."""
ACCUMULATORS = 2
"""One is multiplied into while the other is stored."""
RESULT_BUFFERS = 2
"""One is written while the other is copied to global memory."""
SWIZZLE_BYTES = 128
EPILOGUE_VALUES = 64
"""Float32 values of an accumulator (of gate and up together) that a thread takes from tensor memory at a time, where it is free
to choose: with twice as many the registers just suffice."""
MOST_STAGES = 8
"""Beyond these the latency of global memory is hidden, whatever the shape."""
RESERVED_BYTES = 1024
"""Of shared memory: for what is counted nowhere else, such as the barriers of accumulators."""
