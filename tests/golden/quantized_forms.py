"""Quantized ways to store a checkpoint: gpt-oss MXFP4 experts and DeepSeek block FP8.

The weights are first rounded to values that the format holds exactly, so that the quantized form and the plain one
are the same model and share their expected results.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MXFP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of E2M1 by code; bit 3 of a nibble is the sign."""
MXFP4_GROUP = 32
FP8_MAX = 448.0
UNQUANTIZED = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "e_score_correction_bias", "eh_proj")
"""Parts of the names that stay unquantized in DeepSeek's FP8 checkpoints."""


def encode_mxfp4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] float32 -> uint8 blocks [..., D/32, 16] (even elements in low nibbles) and scales [..., D/32]."""
    groups = rows.reshape(*rows.shape[:-1], -1, MXFP4_GROUP)
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponent = torch.floor(torch.log2(largest)) - 2.0
    codes = ((groups / 2.0**exponent).abs()[..., None] - MXFP4_VALUES).abs().argmin(-1).to(torch.uint8)
    codes |= torch.signbit(groups).to(torch.uint8) << 3
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponent[..., 0] + 127).to(torch.uint8)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_mxfp4`: [..., D] float32."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    values = torch.cat((MXFP4_VALUES, -MXFP4_VALUES))[codes]
    return (values * 2.0 ** (scales.to(torch.float32)[..., None] - 127)).flatten(-2)


def round_to_mxfp4(rows: torch.Tensor) -> torch.Tensor:
    """`rows` with every value replaced by what MXFP4 makes of it."""
    rounded = decode_mxfp4(*encode_mxfp4(rows))
    if not torch.equal(decode_mxfp4(*encode_mxfp4(rounded)), rounded):
        raise ValueError("rounding to MXFP4 is not stable")
    return rounded


def store_mxfp4_experts(folder: Path) -> None:
    """Rewrite the gpt-oss checkpoint in `folder` with `*_blocks` and `*_scales` instead of expert weights."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weights = tensors.pop(name).to(torch.float32).transpose(1, 2).contiguous()
        blocks, scales = encode_mxfp4(weights)
        if not torch.equal(decode_mxfp4(blocks, scales).view(torch.int32), weights.view(torch.int32)):  # -0.0 too
            raise ValueError(f"{name} is not representable in MXFP4")
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _set_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def encode_block_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] float32 -> float8_e4m3fn [N, D] and the multipliers [ceil(N/bn), ceil(D/bd)] float32 that undo it."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            scales[row, column] = _tile(weight, block, row, column).abs().max() / FP8_MAX
    return (weight / _spread(scales, weight.shape, block)).to(torch.float8_e4m3fn), scales


def decode_block_fp8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The inverse of `encode_block_fp8`: [N, D] float32."""
    return weight.to(torch.float32) * _spread(scales, weight.shape, block)


def _tile(weight: torch.Tensor, block: tuple[int, int], row: int, column: int) -> torch.Tensor:
    return weight[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]


def _spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    full = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[: shape[0], : shape[1]]


def is_block_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Whether DeepSeek's FP8 checkpoints quantize this tensor: every projection, no embedding, norm or router."""
    return tensor.ndim >= 2 and not any(part in name for part in UNQUANTIZED)


def round_to_block_fp8(name: str, tensor: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`tensor` as it comes back from block FP8; experts that are stored fused are rounded one matrix at a time."""
    if not is_block_quantized(name, tensor):
        return tensor
    if tensor.ndim == 2:
        return decode_block_fp8(*encode_block_fp8(tensor, block), block)
    parts = 2 if name.endswith("gate_up_proj") else 1
    matrices = [matrix for expert in tensor for matrix in expert.chunk(parts)]
    rounded = [decode_block_fp8(*encode_block_fp8(matrix, block), block) for matrix in matrices]
    return torch.cat(rounded).reshape(tensor.shape)


def quantize_block_fp8(folder: Path, block: tuple[int, int]) -> None:
    """Rewrite the checkpoint in `folder` with float8 weights and `weight_scale_inv` for every projection."""
    tensors = load_file(folder / "model.safetensors")
    result = {}
    for name, tensor in tensors.items():
        if not is_block_quantized(name, tensor):
            result[name] = tensor
            continue
        weight, scales = encode_block_fp8(tensor.to(torch.float32), block)
        if not torch.equal(decode_block_fp8(weight, scales, block), tensor.to(torch.float32)):
            raise ValueError(f"{name} is not representable in block FP8")
        result[name], result[f"{name}_scale_inv"] = weight, scales
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    _set_quantization(
        folder,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)},
    )


def _set_quantization(folder: Path, quantization: dict) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=2) + "\n")
