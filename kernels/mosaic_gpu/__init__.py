"""Pallas Mosaic GPU kernels for grouped matmuls (Hopper wgmma, Blackwell tcgen05); see `docs/kernels.md`."""
