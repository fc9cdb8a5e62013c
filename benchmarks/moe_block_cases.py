"""The MoE blocks of the CPU benchmark, and their random numbers: data that both sides share (numpy alone). Not a script."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEBlock:
    """Sizes of one MoE block; all have hidden size 1024 and SwiGLU experts."""

    name: str
    intermediate_size: int
    num_experts: int
    top_k: int
    renormalize: bool
    shared_intermediate_size: int = 0
    skew: float = 0.0
    """Expert e gets `-skew * log(1 + e)` added to its logit: 0 is even, 1 about Zipf's law."""
    hidden_size: int = 1024

    def parameters(self) -> dict[str, np.ndarray]:
        """float32 weights in (out, in) layout, the same numbers in every process."""
        rng = np.random.default_rng(2024)
        hidden, inner, experts = self.hidden_size, self.intermediate_size, self.num_experts

        def normal(*shape: int) -> np.ndarray:
            array = rng.standard_normal(shape, np.float32)
            array *= np.float32(shape[-1] ** -0.5)
            return array

        parameters = {
            "router": normal(experts, hidden),
            "gate_up_proj": normal(experts, 2, inner, hidden),
            "down_proj": normal(experts, hidden, inner),
        }
        # The first component of every token is 1 (see `tokens`), so this column is a bias of the logits.
        parameters["router"][:, 0] = -self.skew * np.log1p(np.arange(experts))
        if shared := self.shared_intermediate_size:
            parameters |= {
                "shared_gate": normal(shared, hidden),
                "shared_up": normal(shared, hidden),
                "shared_down": normal(hidden, shared),
            }
        return parameters

    def tokens(self, num_tokens: int) -> np.ndarray:
        """float32 [T, H]."""
        tokens = np.random.default_rng(num_tokens).standard_normal((num_tokens, self.hidden_size), np.float32)
        tokens[:, 0] = 1
        return tokens


BLOCKS = {
    block.name: block
    for block in (
        MoEBlock(name="mixtral-like", intermediate_size=3584, num_experts=8, top_k=2, renormalize=True),
        MoEBlock(name="qwen3-like", intermediate_size=384, num_experts=64, top_k=8, renormalize=True),
        MoEBlock(
            name="deepseek-like",
            intermediate_size=512,
            num_experts=64,
            top_k=6,
            renormalize=False,
            shared_intermediate_size=1024,
        ),
        MoEBlock(name="qwen3-like-skewed", intermediate_size=384, num_experts=64, top_k=8, renormalize=True, skew=1.0),
    )
}
TOKENS = (1, 16, 128, 512, 2048)
DTYPES = ("float32", "bfloat16")
