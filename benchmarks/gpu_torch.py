"""The experts of an MoE block with torch's grouped matmul: answers requests of `gpu.py`, see `moe_jax.benchmarking.contest`.

    describe                                   -> versions, or why it cannot run
    prepare  shape=..., topk_ids=FILE.npy      -> error against float32 (topk_ids: [sets, T, K])
    measure  calls=...                         -> seconds per call, queued and as a CUDA graph

A process of its own, so that neither framework takes the other's memory. Reads one request per line from standard input; gpu.py
starts it. Needs torch, and no moe_jax.
"""

import argparse
import json
import statistics
import sys

import numpy as np

try:
    import torch  # noqa: TID251 - the other side of a comparison, run where torch is
except ImportError as error:
    raise SystemExit(f"gpu_torch.py, which gpu.py starts, needs torch: {error}") from None

CHECKED_TOKENS = 64


def grouped_mm():
    """Torch's grouped matmul under its public name, or under the one it had before."""
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class Experts:
    """Random weights of one shape."""

    def __init__(self, *, hidden_size, intermediate_size, num_experts, local_experts, top_k, activation, has_bias):
        self.E, self.H, self.I, self.K = local_experts, hidden_size, intermediate_size, top_k
        self.activation = activation
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.gate_up = torch.randn(self.E, 2 * self.I, self.H, **options).mul_(self.H**-0.5)
        self.down = torch.randn(self.E, self.H, self.I, **options).mul_(self.I**-0.5)
        self.gate_up_bias = torch.randn(self.E, 2 * self.I, **options) if has_bias else None
        self.down_bias = torch.randn(self.E, self.H, **options) if has_bias else None

    def activate(self, projected):
        gate, up = projected.chunk(2, dim=-1)
        if self.activation == "silu":
            return torch.nn.functional.silu(gate) * up
        if self.activation == "swigluoai":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        raise ValueError(f"activation must be silu or swigluoai, got {self.activation!r}")

    def block(self, x, topk_weights, topk_ids):
        """Sort, gather, multiply, activate, multiply, combine; nothing waits for the host."""
        T = len(x)
        expert = topk_ids.clamp(max=self.E).flatten()
        expert_sorted, order = expert.sort(stable=True)
        ends = torch.searchsorted(expert_sorted, torch.arange(1, self.E + 1, device="cuda", dtype=torch.int32))
        ends = ends.to(torch.int32)
        own = expert_sorted.clamp(max=self.E - 1)
        projected = grouped_mm()(x[order // self.K], self.gate_up.transpose(1, 2), offs=ends)
        if self.gate_up_bias is not None:
            projected = projected + self.gate_up_bias[own]
        result = grouped_mm()(self.activate(projected), self.down.transpose(1, 2), offs=ends)
        if self.down_bias is not None:
            result = result + self.down_bias[own]
        by_pair = torch.empty_like(order)
        by_pair[order] = torch.arange(len(order), device="cuda")
        weighted = result[by_pair].view(T, self.K, self.H).float() * topk_weights[:, :, None]
        return weighted.masked_fill((topk_ids >= self.E)[:, :, None], 0).sum(1).to(x.dtype)

    def float32_block(self, x, topk_weights, topk_ids):
        """The definition, expert by expert."""
        x, total = x.float(), torch.zeros_like(x, dtype=torch.float32)
        for expert in range(self.E):
            weight = (topk_weights * (topk_ids == expert)).sum(1)
            if not weight.any():
                continue
            projected = x @ self.gate_up[expert].float().T
            if self.gate_up_bias is not None:
                projected += self.gate_up_bias[expert].float()
            result = self.activate(projected) @ self.down[expert].float().T
            if self.down_bias is not None:
                result += self.down_bias[expert].float()
            total += weight[:, None] * result
        return total


class Side:
    """Holds what one request leaves for the next."""

    def describe(self):
        if not torch.cuda.is_available():
            return {"unavailable": "torch sees no GPU"}
        if grouped_mm() is None:
            return {"unavailable": f"torch {torch.__version__} has no grouped matmul"}
        torch.zeros(1, device="cuda")  # starts CUDA, for which only this request is given the time
        return {"torch": torch.__version__, "cuda": torch.version.cuda}

    def prepare(self, *, shape, topk_ids):
        self.experts = self.sets = None
        torch.cuda.empty_cache()
        self.experts = Experts(**shape)
        self.sets = []
        for ids in torch.from_numpy(np.load(topk_ids)).to("cuda"):
            x = torch.randn(len(ids), shape["hidden_size"], device="cuda", dtype=torch.bfloat16)
            self.sets.append((x, torch.randn(ids.shape, device="cuda").softmax(1), ids))
        result = self.experts.block(*self.sets[0])[:CHECKED_TOKENS].float()
        expected = self.experts.float32_block(*(part[:CHECKED_TOKENS] for part in self.sets[0]))
        norm = expected.norm().item()
        error = (result - expected).norm().item()
        return {"error": error / norm if norm else error}

    def measure(self, *, calls):
        for arguments in self.sets:
            self.experts.block(*arguments)
        turns = [self.sets[call % len(self.sets)] for call in range(calls)]
        queued = [self.seconds(lambda: [self.experts.block(*arguments) for arguments in turns]) for _ in range(3)]
        answer = {"queued": statistics.median(queued) / calls, "graph": None}
        try:
            replayed = self.replayed(turns)
        except RuntimeError as error:
            return {**answer, "why_no_graph": str(error)[:500]}
        return {**answer, "graph": statistics.median(replayed) / calls}

    def replayed(self, turns):
        """Seconds of replays of a graph of these calls."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # captured work must have run on a side stream before
            for arguments in turns:
                self.experts.block(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for arguments in turns:
                self.experts.block(*arguments)
        graph.replay()
        return [self.seconds(graph.replay) for _ in range(3)]

    @staticmethod
    def seconds(work):
        """Between two events on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with torch.no_grad():
                answer = getattr(side, request.pop("action"))(**request)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
