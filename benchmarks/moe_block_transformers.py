"""Worker of the CPU benchmark: the MoE blocks of Hugging Face `transformers` on torch.

moe_block_cpu.py starts it with the Python of an environment that has torch and transformers (`make golden-env`). It reads one
request per line from standard input, and imports nothing of moe_jax.
"""

import argparse
import json
import sys
import time

import numpy as np
from moe_block_cases import BLOCKS, MoEBlock

try:
    import torch
    import transformers
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock
except ImportError as error:
    raise SystemExit(f"moe_block_transformers.py needs torch and transformers (`make golden-env`): {error}") from None


def build(block: MoEBlock, dtype: torch.dtype) -> torch.nn.Module:
    """The transformers module of this block, with our numbers in it."""
    common = {"hidden_size": block.hidden_size, "num_experts_per_tok": block.top_k}
    if block.shared_intermediate_size:
        config = DeepseekV2Config(
            **common,
            n_routed_experts=block.num_experts,
            moe_intermediate_size=block.intermediate_size,
            n_shared_experts=block.shared_intermediate_size // block.intermediate_size,
            topk_method="greedy",
            routed_scaling_factor=1.0,
        )
        module_class = DeepseekV2Moe
    elif block.num_experts > 8:
        config = Qwen3MoeConfig(
            **common,
            num_experts=block.num_experts,
            moe_intermediate_size=block.intermediate_size,
            norm_topk_prob=block.renormalize,
        )
        module_class = Qwen3MoeSparseMoeBlock
    else:
        config = MixtralConfig(**common, num_local_experts=block.num_experts, intermediate_size=block.intermediate_size)
        module_class = MixtralSparseMoeBlock
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = module_class(config)
    parameters = {name: torch.from_numpy(array).to(dtype) for name, array in block.parameters().items()}
    state = {
        "gate.weight": parameters["router"],
        "experts.gate_up_proj": parameters["gate_up_proj"].flatten(1, 2),
        "experts.down_proj": parameters["down_proj"],
    }
    for name in ("gate", "up", "down"):
        if f"shared_{name}" in parameters:
            state[f"shared_experts.{name}_proj.weight"] = parameters[f"shared_{name}"]
    module.load_state_dict(state, assign=True, strict=True)
    return module.eval()


class Worker:
    """One block at a time, in any of the experts implementations."""

    def __init__(self) -> None:
        self.loaded, self.module, self.x = None, None, None

    def describe(self) -> dict:
        """What runs here."""
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    def prepare(self, block: str, dtype: str, tokens: int, output: str | None) -> dict:
        """Make this cell ready, and write its result for comparison."""
        if self.loaded != (block, dtype):
            self.module = None
            self.module, self.loaded = build(BLOCKS[block], getattr(torch, dtype)), (block, dtype)
        self.x = torch.from_numpy(BLOCKS[block].tokens(tokens)).to(getattr(torch, dtype))[None]
        for variant in ("eager", "grouped_mm"):
            self.call(variant)
        if output is not None:
            np.save(output, self.call("eager")[0].float().numpy())
        return {}

    def call(self, variant: str) -> torch.Tensor:
        experts = self.module.experts
        experts.config._experts_implementation = variant
        with torch.inference_mode():
            return self.module(self.x)

    def measure(self, variant: str, seconds: float) -> dict:
        """Call for about that long, at least twice."""
        times = []
        while len(times) < 2 or sum(times) < seconds:
            start = time.perf_counter()
            self.call(variant)
            times.append(time.perf_counter() - start)
        return {"seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True, metavar="N", help="threads that torch may use")
    torch.set_num_threads(parser.parse_args().threads)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("action"))(**request)), flush=True)


if __name__ == "__main__":
    main()
