"""Measuring: what the scripts in `benchmarks/` share."""
