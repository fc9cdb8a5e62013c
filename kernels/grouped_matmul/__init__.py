"""Grouped matmul: each row times the matrix of its group. `api.py` is the contract; one file per implementation."""

from .api import explain_grouped_matmul, grouped_matmul

__all__ = ["explain_grouped_matmul", "grouped_matmul"]
