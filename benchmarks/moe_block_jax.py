"""Worker of the CPU benchmark: `moe_jax.MoERunner`, and the experts alone against `jax.lax.ragged_dot`.

moe_block_cpu.py starts it. It reads one request per line from standard input.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from moe_block_cases import BLOCKS, MoEBlock
from moe_block_matmuls import matmuls_alone

import moe_jax
from moe_jax import MoEConfig, MoERunner, RouterConfig, SharedExpertsConfig
from moe_jax.kernels import explain_fused_moe, grouped_matmul


def build(block: MoEBlock, dtype: jnp.dtype) -> MoERunner:
    """The layer, with the numbers of this block in it."""
    shared = block.shared_intermediate_size
    config = MoEConfig(
        hidden_size=block.hidden_size,
        intermediate_size=block.intermediate_size,
        num_experts=block.num_experts,
        top_k=block.top_k,
        router=RouterConfig(renormalize=block.renormalize),
        shared_experts=SharedExpertsConfig(intermediate_size=shared) if shared else None,
        param_dtype=dtype,
    )
    layer = nnx.eval_shape(lambda: MoERunner(config, rngs=nnx.Rngs(0)))
    parameters = {name: jnp.asarray(array, dtype) for name, array in block.parameters().items()}
    layer.router.weight.set_value(parameters["router"])
    layer.routed_experts.gate_up_proj.set_value(parameters["gate_up_proj"])
    layer.routed_experts.down_proj.set_value(parameters["down_proj"])
    if shared:
        for name in ("gate", "up", "down"):
            linear = getattr(layer.shared_experts, f"{name}_proj")
            linear.kernel.set_value(parameters[f"shared_{name}"].T)
    return layer


class Worker:
    """One block at a time."""

    def __init__(self) -> None:
        self.loaded, self.state, self.graph = None, None, None
        self.calls: dict[str, Callable[[], jax.Array | list[jax.Array]]] = {}

    def describe(self) -> dict:
        """What runs here."""
        return {"jax": jax.__version__, "moe_jax": getattr(moe_jax, "__version__", "source tree")}

    def prepare(self, block: str, dtype: str, tokens: int, output: str | None) -> dict:
        """Compile this cell, and write its result for comparison."""
        case = BLOCKS[block]
        if self.loaded != (block, dtype):
            self.calls, self.state = {}, None
            self.graph, self.state = nnx.split(build(case, jnp.dtype(dtype)))
            self.loaded = (block, dtype)
        graph, state = self.graph, self.state
        x = jnp.asarray(case.tokens(tokens), dtype)
        layer = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
        self.calls = {"moe_jax": lambda: layer(state, x)}
        result = layer(state, x).block_until_ready()
        if output is not None:
            np.save(output, np.asarray(result, np.float32))
        weights = nnx.merge(graph, state).routed_experts.weights()
        routing = [jax.ShapeDtypeStruct((tokens, case.top_k), kind) for kind in (jnp.float32, jnp.int32)]
        choice = explain_fused_moe(x, *routing, weights.gate_up_proj, weights.down_proj)
        return {"formulation": choice.formulation}

    def prepare_matmuls(self, block: str, dtype: str, tokens: int) -> dict:
        """Compile the matmuls of this cell alone, in several forms."""
        self.calls, self.state, self.loaded = {}, None, None
        self.calls = matmuls_alone(BLOCKS[block], dtype, tokens)
        return {"forms": list(self.calls)}

    def prepare_ragged_dot(self, dtype: str) -> dict:
        """4096 rows of width 1024 in 64 even groups, times [768, 1024]."""
        self.calls, self.state, self.loaded = {}, None, None
        rng = np.random.default_rng(0)
        rows = jnp.asarray(rng.standard_normal((4096, 1024), np.float32), dtype)
        weights = jnp.asarray(rng.standard_normal((64, 768, 1024), np.float32), dtype)
        transposed = jnp.asarray(weights.mT)
        sizes = jnp.full(64, 64, jnp.int32)
        ours = jax.jit(grouped_matmul).lower(rows, weights, sizes).compile()
        theirs = jax.jit(jax.lax.ragged_dot).lower(rows, transposed, sizes).compile()
        self.calls = {
            "moe_jax": lambda: ours(rows, weights, sizes),
            "ragged_dot": lambda: theirs(rows, transposed, sizes),
        }
        results = [np.asarray(call(), np.float32) for call in self.calls.values()]
        return {"difference": float(np.abs(results[0] - results[1]).max() / np.abs(results[1]).max())}

    def measure(self, variant: str, seconds: float) -> dict:
        """Call for about that long, at least twice."""
        call, times = self.calls[variant], []
        while len(times) < 2 or sum(times) < seconds:
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return {"seconds": times}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("action"))(**request)), flush=True)


if __name__ == "__main__":
    main()
