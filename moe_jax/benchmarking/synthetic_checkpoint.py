"""Hugging Face folders of any size with random content, for measuring conversion."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoints.tensor_plan import plan_tensors
from moe_jax.families import get_family

Description = tuple[str, str, tuple[int, ...], int]
"""Name, safetensors dtype, shape, bytes."""

_POOL_BYTES = 64 << 20

QWEN3_LIKE: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Three layers of Qwen3-30B-A3B's shape: 5 GB in bfloat16."""

DEEPSEEK_V3_LAYER: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
"""One MoE layer of DeepSeek-V3's true shape with its embedding and output table: 15 GB, 26 GB when decoded to
bfloat16."""


def write_synthetic_checkpoint(folder: Path, config: Mapping[str, Any], shard_bytes: int, seed: int = 0) -> int:
    """Write a checkpoint of this configuration in the per-expert form with random numbers; its size in bytes.

    Args:
        folder: The folder to create.
        config: Content of its `config.json`; with method fp8 every projection is stored as block FP8.
        shard_bytes: Size of a safetensors file, at most.
        seed: Of the random numbers.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    shards: list[list[Description]] = [[]]
    for description in _descriptions(config):
        if shards[-1] and sum(nbytes for *_, nbytes in shards[-1]) + description[3] > shard_bytes:
            shards.append([])
        shards[-1].append(description)
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 0x7F, _POOL_BYTES, np.uint8)
    scales = rng.uniform(2**-13, 2**-9, _POOL_BYTES // 4).astype(
        np.float32
    )  # any bits could be far out of bfloat16's range
    pools = {"F8_E4M3": bits, "BF16": bits, "F32": scales.view(np.uint8)}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor: name for tensor, *_ in shard}
        _write_shard(folder / name, shard, pools)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(nbytes for shard in shards for *_, nbytes in shard)


def _descriptions(config: Mapping[str, Any]) -> Iterator[Description]:
    family = get_family(config)
    block = config.get("quantization_config", {}).get("weight_block_size")
    for tensor in plan_tensors(family.build_decoder(config), family, "per_expert"):
        size = int(np.prod(tensor.shape))
        if tensor.path.endswith("correction_bias"):
            yield tensor.name, "F32", tensor.shape, 4 * size
        elif block and tensor.path.endswith(("_proj", "_proj.kernel")):
            grid = tuple(-(-length // step) for length, step in zip(tensor.shape, block, strict=True))
            yield tensor.name, "F8_E4M3", tensor.shape, size
            yield f"{tensor.name}_scale_inv", "F32", grid, 4 * int(np.prod(grid))
        else:
            yield tensor.name, "BF16", tensor.shape, 2 * size


def _write_shard(file: Path, tensors: list[Description], pools: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for number, (_, dtype, _, nbytes) in enumerate(tensors):
            pool = pools[dtype]
            offset = number * 4096 % len(pool)  # neighbouring tensors differ
            while nbytes:
                count = min(nbytes, len(pool) - offset)
                stream.write(memoryview(pool[offset : offset + count]))
                nbytes, offset = nbytes - count, 0
