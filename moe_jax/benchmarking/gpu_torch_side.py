"""What the process of `benchmarks/gpu_torch.py` is asked for."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.benchmarking.contest import WorkerProcess
from moe_jax.benchmarking.expert_shapes import ExpertShape

MOST_ERROR = 2e-2
"""It rounds between the steps."""


def measure_torch(process: WorkerProcess, shape: ExpertShape, topk_ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """Check and time torch's grouped matmul on these routings: calls that are queued, and calls in one CUDA graph."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "topk_ids.npy"
        np.save(file, np.stack(topk_ids))
        description = {
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_experts": shape.num_experts,
            "local_experts": shape.local_experts,
            "top_k": shape.top_k,
            "activation": shape.activation.name,
            "has_bias": shape.has_bias,
        }
        prepared = process.request("prepare", shape=description, topk_ids=str(file))
    if "failed" in prepared:
        return prepared
    if not prepared["error"] <= MOST_ERROR:
        return {"error": prepared["error"], "failed": f"wrong: relative error {prepared['error']:.2g}"}
    times = process.request("measure", calls=10)
    if "failed" in times:
        return {**prepared, **times}
    queued, graph = times["queued"], times["graph"]
    return {
        **prepared,
        "seconds": queued if graph is None else min(queued, graph),
        "call_seconds": queued,
        "in_program_seconds": graph,
    }
