"""Tiny Hugging Face folders, and raw safetensors files that may lie; independent of the code under test."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int64): "I64",
}

QWEN3: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def qwen3_shapes(config: Mapping[str, Any] = QWEN3) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a per-expert Qwen3-MoE checkpoint whose layers all are sparse."""
    hidden, intermediate, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}self_attn.q_norm.weight": (head,),
            f"{prefix}self_attn.k_norm.weight": (head,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate.weight": (config["num_experts"], hidden),
        }
        for expert in range(config["num_experts"]):
            shapes |= {
                f"{prefix}mlp.experts.{expert}.gate_proj.weight": (intermediate, hidden),
                f"{prefix}mlp.experts.{expert}.up_proj.weight": (intermediate, hidden),
                f"{prefix}mlp.experts.{expert}.down_proj.weight": (hidden, intermediate),
            }
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(
    rng: np.random.Generator, config: Mapping[str, Any] = QWEN3, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """A whole Qwen3-MoE checkpoint of random numbers."""
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in qwen3_shapes(config).items()}


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The true header of a file that holds `tensors` in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    return header


def write_raw(file: Path, header: str | bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file with exactly this header text and data; `length` lies about the header's length."""
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def write_file(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """An honest safetensors file."""
    write_raw(file, json.dumps(header_of(tensors)), b"".join(array.tobytes() for array in tensors.values()))


def write_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] = QWEN3, shards: int = 1
) -> Path:
    """A Hugging Face folder; with several shards, tensors are dealt out in turn and an index is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    weight_map = {tensor: names[number % shards] for number, tensor in enumerate(tensors)}
    for name in names:
        write_file(folder / name, {tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == name})
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    """The index file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face folder, read with the `safetensors` package."""
    from safetensors import safe_open

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def assert_same_tensors(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype), name
        assert actual[name].tobytes() == array.tobytes(), name


def assert_nothing_that_looks_whole(output: Path) -> None:
    """No output folder, and what is left of the work isn't taken for a checkpoint."""
    from moe_jax.checkpoints import CheckpointError, open_checkpoint

    assert not output.exists()
    work = output.with_name(output.name + ".incomplete")
    assert not (work / "moe_jax.json").exists()
    if work.exists():
        renamed = work.with_name("renamed by hand")
        work.rename(renamed)
        try:
            open_checkpoint(renamed)
        except CheckpointError:
            pass
        else:
            raise AssertionError(f"{work} opens as a checkpoint")
        finally:
            renamed.rename(work)
