"""Pallas TPU kernels for grouped matmuls; see `docs/kernels.md`."""
