"""Every parameter of a decoder: its path in our tree and its shape, from the configuration alone.

The converter checks a checkpoint against this table before it writes a byte, and models build exactly these parameters.
`L` in a path is the layer's number: on disk every layer has parameters of its own; loading stacks those of one kind.
"""

from collections.abc import Iterator

from moe_jax.config import MoEConfig
from moe_jax.families.decoder import Attention, Decoder, DenseFeedForward, GroupedQueryAttention, LatentAttention
from moe_jax.kernels import Activation

Shape = tuple[int, ...]

FLOAT32_PARAMETERS = ("correction_bias",)
"""Last path components of parameters that stay float32 whatever dtype the rest is converted to."""


def parameter_shapes(decoder: Decoder) -> dict[str, Shape]:
    """Path -> shape of every parameter, in the order of a forward pass.

    Linear maps are `kernel [in, out]` (as `nnx.Linear`), expert weights (out, in): `gate_up_proj [E, 2, I, H]`
    (`[E, 1, I, H]` for a non-gated activation) and `down_proj [E, H, I]`; the router's weight is `[E, H]`.
    """
    hidden = decoder.hidden_size
    shapes: dict[str, Shape] = {"embedder.embedding": (decoder.vocab_size, hidden)}
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}"
        shapes[f"{prefix}.attention_norm.scale"] = (hidden,)
        shapes |= {f"{prefix}.attention.{path}": shape for path, shape in _attention(layer.attention, hidden)}
        shapes[f"{prefix}.feed_forward_norm.scale"] = (hidden,)
        if isinstance(layer.feed_forward, MoEConfig):
            rows = _mixture(layer.feed_forward)
        else:
            rows = _dense(layer.feed_forward, hidden)
        shapes |= {f"{prefix}.feed_forward.{path}": shape for path, shape in rows}
    shapes["final_norm.scale"] = (hidden,)
    if not decoder.tie_word_embeddings:
        shapes["lm_head.kernel"] = (hidden, decoder.vocab_size)
    return shapes


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.kernel", (inputs, outputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _attention(attention: Attention, hidden: int) -> Iterator[tuple[str, Shape]]:
    if isinstance(attention, GroupedQueryAttention):
        yield from _grouped_query(attention, hidden)
    else:
        yield from _latent(attention, hidden)


def _grouped_query(attention: GroupedQueryAttention, hidden: int) -> Iterator[tuple[str, Shape]]:
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    yield from _linear("q_proj", hidden, queries, attention.qkv_bias)
    yield from _linear("k_proj", hidden, keys, attention.qkv_bias)
    yield from _linear("v_proj", hidden, keys, attention.qkv_bias)
    yield from _linear("o_proj", queries, hidden, attention.output_bias)
    if attention.qk_norm is not None:
        per_head = attention.qk_norm == "head"
        yield "q_norm.scale", (attention.head_dim if per_head else queries,)
        yield "k_norm.scale", (attention.head_dim if per_head else keys,)
    if attention.sinks:
        yield "sinks", (attention.num_heads,)


def _latent(attention: LatentAttention, hidden: int) -> Iterator[tuple[str, Shape]]:
    queries = attention.num_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    if attention.q_lora_rank is None:
        yield from _linear("q_proj", hidden, queries, False)
    else:
        yield from _linear("q_a_proj", hidden, attention.q_lora_rank, attention.bias)
        yield "q_a_norm.scale", (attention.q_lora_rank,)
        yield from _linear("q_b_proj", attention.q_lora_rank, queries, False)
    yield from _linear("kv_a_proj", hidden, attention.kv_lora_rank + attention.qk_rope_head_dim, attention.bias)
    yield "kv_a_norm.scale", (attention.kv_lora_rank,)
    keys_and_values = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield from _linear("kv_b_proj", attention.kv_lora_rank, keys_and_values, False)
    yield from _linear("o_proj", attention.num_heads * attention.v_head_dim, hidden, attention.bias)


def _dense(feed_forward: DenseFeedForward, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield from _gated_mlp("", hidden, feed_forward.intermediate_size, feed_forward.bias)


def _gated_mlp(prefix: str, hidden: int, intermediate: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{prefix}gate_proj", hidden, intermediate, bias)
    yield from _linear(f"{prefix}up_proj", hidden, intermediate, bias)
    yield from _linear(f"{prefix}down_proj", intermediate, hidden, bias)


def _mixture(moe: MoEConfig) -> Iterator[tuple[str, Shape]]:
    experts, hidden, intermediate = moe.num_experts, moe.hidden_size, moe.intermediate_size
    halves = 2 if Activation.of(moe.activation).is_gated else 1
    yield "router.weight", (experts, hidden)
    if moe.router.logits_bias:
        yield "router.bias", (experts,)
    if moe.router.correction_bias:
        yield "router.correction_bias", (experts,)
    yield "routed_experts.gate_up_proj", (experts, halves, intermediate, hidden)
    yield "routed_experts.down_proj", (experts, hidden, intermediate)
    if moe.expert_bias:
        yield "routed_experts.gate_up_bias", (experts, halves, intermediate)
        yield "routed_experts.down_bias", (experts, hidden)
    if moe.shared_experts is not None:
        shared = moe.shared_experts
        yield from _gated_mlp("shared_experts.", hidden, shared.intermediate_size, shared.bias)
        if shared.sigmoid_gate:
            yield "shared_experts.gate.kernel", (hidden, 1)
