"""How XLA compiles in tests: for as many CPU devices as a test needs, and quickly.

Tests spend most of their time compiling programs that run once. Machine code that isn't optimized takes two thirds of that; what
XLA makes of the operations themselves stays as users have it.
"""

_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def xla_flags(num_devices: int) -> str:
    """`XLA_FLAGS` of a process with so many CPU devices."""
    return f"{_QUICK} --xla_force_host_platform_device_count={num_devices}"
