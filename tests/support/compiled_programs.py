"""Small models, and the text of programs that were compiled ahead of time, for tests of what is read from both.

`tests/aot/programs` holds such text; layouts and metadata aside, nothing in it was changed. `collectives_*` is a scan of 5 layers
over tokens `[8 * devices * experts, 128]` in bfloat16, split over ("data", "expert"), each layer with one collective of every
kind; `loops_*` a loop of unknown length around a scan of 7 layers; `ragged_*` a scan of 5 layers with one ragged all-to-all
between the GPUs of two hosts.
"""

from pathlib import Path

from moe_jax.aot.collectives import Collective
from moe_jax.families import get_family

PROGRAMS = Path(__file__).parent.parent / "aot" / "programs"


def recorded(name):
    """The text of a recorded program."""
    return (PROGRAMS / f"{name}.hlo").read_text()


def collective(kind, **changes):
    fields = dict(
        kind=kind, name="c", computation="main", operand_types=(), operand_bytes=800, result_bytes=800, groups=(),
        group_size=8, executions=1, open_loops=0, is_async=False, meanwhile=(), op_name="",
    )  # fmt: skip
    return Collective(**(fields | changes))


GROUPED_QUERY = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 6,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "vocab_size": 40,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LATENT = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "num_hidden_layers": 5,
    "vocab_size": 40,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def decoder_of(config):
    return get_family(config).build_decoder(config)
