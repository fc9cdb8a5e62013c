"""Shapes of published models' experts, and the numbers of tokens that kernels are compiled for and measured with."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels import Activation

TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
"""From one decoded token to a large prefill."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The experts of one MoE layer, or one rank's share of them under expert parallelism."""

    name: str
    """Model, and the rank's share if it is not the whole; fit for file names."""
    hidden_size: int
    """H."""
    intermediate_size: int
    """I of one expert."""
    num_experts: int
    """Experts that the router chooses from."""
    top_k: int
    """K, experts per token."""
    activation: Activation = Activation("silu")
    """Gated, so that there are gate and up projections."""
    has_bias: bool = False
    """Whether both projections have biases."""
    ranks: int = 1
    """The experts are split evenly over this many ranks; the shape is that of the first."""

    def __post_init__(self) -> None:
        if self.num_experts % self.ranks:
            raise ValueError(f"ranks must divide num_experts={self.num_experts}, got {self.ranks}")

    @property
    def local_experts(self) -> int:
        """E, the experts whose weights are at hand: those with the ids 0 to E - 1."""
        return self.num_experts // self.ranks

    def rows_per_expert(self, tokens: int) -> float:
        """Mean number of rows of an expert, of `tokens` tokens routed uniformly over all `num_experts`."""
        return tokens * self.top_k / self.num_experts

    def expected_rows(self, tokens: int) -> int:
        """How many of the choices of `tokens` tokens name a local expert, if every expert is as likely as any."""
        return math.ceil(tokens * self.top_k / self.ranks)

    def fused_moe_arguments(self, tokens: int, dtype: Any = jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct | None]:
        """Shapes and dtypes of the arrays that `moe_jax.kernels.fused_moe` takes, by name.

        Args:
            tokens: T; under expert parallelism all tokens that the ranks together route.
            dtype: of tokens, weights and biases.
        """
        T, H, I, E, K = tokens, self.hidden_size, self.intermediate_size, self.local_experts, self.top_k  # noqa: E741
        P = 2 if self.activation.is_gated else 1
        shape = jax.ShapeDtypeStruct
        return {
            "x": shape((T, H), dtype),
            "topk_weights": shape((T, K), jnp.float32),
            "topk_ids": shape((T, K), jnp.int32),
            "gate_up_proj": shape((E, P, I, H), dtype),
            "down_proj": shape((E, H, I), dtype),
            "gate_up_bias": shape((E, P, I), dtype) if self.has_bias else None,
            "down_bias": shape((E, H), dtype) if self.has_bias else None,
        }


_DEEPSEEK_V3 = ExpertShape(name="deepseek-v3", hidden_size=7168, intermediate_size=2048, num_experts=256, top_k=8)
_GPT_OSS_120B = ExpertShape(
    name="gpt-oss-120b",
    hidden_size=2880,
    intermediate_size=2880,
    num_experts=128,
    top_k=4,
    activation=Activation("swigluoai"),
    has_bias=True,
)

EXPERT_SHAPES: dict[str, ExpertShape] = {
    shape.name: shape
    for shape in (
        ExpertShape(name="mixtral-8x7b", hidden_size=4096, intermediate_size=14336, num_experts=8, top_k=2),
        ExpertShape(name="qwen3-30b-a3b", hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8),
        ExpertShape(name="qwen3-235b-a22b", hidden_size=4096, intermediate_size=1536, num_experts=128, top_k=8),
        _DEEPSEEK_V3,
        dataclasses.replace(_DEEPSEEK_V3, name="deepseek-v3-ep8", ranks=8),
        dataclasses.replace(_DEEPSEEK_V3, name="deepseek-v3-ep32", ranks=32),
        dataclasses.replace(_DEEPSEEK_V3, name="deepseek-v3-ep64", ranks=64),
        dataclasses.replace(_GPT_OSS_120B, name="gpt-oss-20b", num_experts=32),
        _GPT_OSS_120B,
        ExpertShape(name="olmoe-1b-7b", hidden_size=2048, intermediate_size=1024, num_experts=64, top_k=8),
    )
}
"""By name. Source: `config.json` of each published checkpoint."""

TPU_SHAPES = tuple(name for name in EXPERT_SHAPES if name not in ("deepseek-v3", "gpt-oss-20b"))
"""Those whose kernels are compiled for TPUs: of DeepSeek-V3 one rank's, because no chip holds all, and the larger gpt-oss."""
