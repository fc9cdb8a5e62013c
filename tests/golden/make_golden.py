"""Make the golden files: tiny random checkpoints written by `transformers`, and what it computes from them.

    python tests/golden/make_golden.py [family[/case] ...]

runs in the environment that `make golden-env` creates (torch and transformers). Every case is deterministic: its seed
is the first one for which no decision hangs by a thread (see the `MIN_` constants), and is recorded in `case.json`.
"""

import argparse
import copy
import json
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from golden_specs import COMMON, SPECS, GoldenSpec
from hub_style import hub_style_config
from quantized_forms import quantize_block_fp8, round_to_block_fp8, round_to_mxfp4, store_mxfp4_experts
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent
BATCH, LENGTH = 2, 40
RAGGED_LENGTHS = (7, 20, 33)
NEW_TOKENS = 32
MAX_SHARD_SIZE = "150KB"
MIN_LOGIT_GAP = 1e-3
"""Smallest accepted gap between the two best logits of a greedy step, in standard deviations of the logits."""
MIN_ROUTING_GAP = 1e-4
"""Smallest accepted gap between the last expert (or group) chosen and the best one left out."""
MIN_DISTINCT_TOKENS = 10
"""Each greedy text has at least this many different tokens, so that it cannot be right by repeating itself."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class UnsuitableSeedError(Exception):
    """A decision of this seed is too close to call, or its greedy texts say too little."""


def draw_parameter(name: str, shape: tuple[int, ...], transposed: bool, spec: GoldenSpec, seed: int) -> np.ndarray:
    """A random value for the parameter `name`: nothing is zero or one, and every unit has an effect of order one."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "e_score_correction_bias":
        return spec.correction_bias_mean + 0.2 * noise
    if "norm" in name:
        return 1.0 + 0.2 * noise
    if leaf == "sinks":
        return 0.5 + noise
    if "bias" in leaf:
        return 0.2 * noise
    if "embed_tokens" in name:
        return noise * (0.3 if spec.config.get("tie_word_embeddings") else 1.0)
    gain = (
        2.0
        if any(part in name for part in ("q_proj", "q_b_proj", "down_proj", "gate.weight", "lm_head", "router"))
        else 1.2
    )
    fan_in = shape[-2] if transposed else shape[-1]
    return noise * gain / np.sqrt(fan_in)


def build_model(spec: GoldenSpec, seed: int) -> transformers.PreTrainedModel:
    """The model of `spec` in float32, its weights drawn from `seed` and representable in every form of the case."""
    config = transformers.AutoConfig.for_model(spec.family, **{**COMMON, **spec.config})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    model.set_experts_implementation("eager")
    transposed_experts = spec.family == "gpt_oss"
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name.endswith("inv_freq"):
            continue
        value = draw_parameter(name, tuple(tensor.shape), transposed_experts and tensor.ndim == 3, spec, seed)
        value = torch.from_numpy(value).to(torch.float32)
        if not name.endswith("e_score_correction_bias"):
            value = value.to(DTYPES[spec.dtype]).to(torch.float32)
        if "mxfp4" in spec.forms and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            value = round_to_mxfp4(value.transpose(1, 2)).transpose(1, 2)
        if spec.fp8_block is not None:
            value = round_to_block_fp8(name, value, spec.fp8_block)
        tensor.data.copy_(value)
    return model


class RouterTap:
    """Records the experts chosen by every router while it is attached, and how close each choice was."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.ids: list[np.ndarray] = []
        self.min_gap = np.inf
        config = model.config
        self.groups = getattr(config, "n_group", None) if getattr(config, "topk_method", "") != "greedy" else None
        self.groups_kept = getattr(config, "topk_group", None)
        self.group_score_is_max = config.model_type == "deepseek_v2"
        routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
        self.handles = [router.register_forward_hook(self.record) for router in routers]
        self.num_layers = len(routers)

    def record(self, router: torch.nn.Module, inputs, outputs) -> None:
        logits, _, ids = outputs
        chosen = np.sort(ids.numpy(), axis=-1)
        if np.isnan(logits.numpy()).any() or (np.diff(chosen, axis=-1) == 0).any():
            raise ValueError("a router produced NaN or chose one expert twice")
        self.ids.append(chosen)
        scores = logits.to(torch.float64)
        if hasattr(router, "e_score_correction_bias"):
            scores = scores.sigmoid() + router.e_score_correction_bias
        scores = scores.numpy()
        top_k = chosen.shape[-1]
        if self.groups:
            grouped = np.sort(scores.reshape(len(scores), self.groups, -1), axis=-1)
            group_scores = grouped[..., -1] if self.group_score_is_max else grouped[..., -2:].sum(-1)
            self.note_gap(group_scores, self.groups_kept)
            kept = np.argsort(-group_scores, axis=-1)[:, : self.groups_kept]
            mask = np.zeros((len(scores), self.groups), bool)
            np.put_along_axis(mask, kept, True, axis=-1)
            scores = np.where(np.repeat(mask, scores.shape[-1] // self.groups, axis=-1), scores, -np.inf)
        self.note_gap(scores, top_k)

    def note_gap(self, scores: np.ndarray, chosen: int) -> None:
        if chosen < scores.shape[-1]:
            ranked = np.sort(scores, axis=-1)
            self.min_gap = min(self.min_gap, float((ranked[:, -chosen] - ranked[:, -chosen - 1]).min()))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def pad(
    prompts: list[np.ndarray], side: str, rng: np.random.Generator, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> ids [R, N] and attention mask [R, N]; the padding is junk, because its ids must not matter."""
    width = max(map(len, prompts))
    ids, mask = rng.integers(0, vocab_size, (len(prompts), width)), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), None) if side == "left" else slice(None, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def padded_logits(model, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Logits [R, N, V] with positions counted from each row's first real token; zero at padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return (logits * mask[..., None]).numpy()


def greedy_continuation(model, prompt: np.ndarray) -> np.ndarray:
    """`NEW_TOKENS` greedy tokens after `prompt`, checked against one forward pass over the whole text."""
    ids = torch.from_numpy(prompt)[None]
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    logits = model(input_ids=text[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    best = logits.topk(2, dim=-1)
    if ((best.values[:, 0] - best.values[:, 1]) < MIN_LOGIT_GAP * logits.std()).any():
        raise UnsuitableSeedError("two tokens are nearly as likely")
    continuation = text[0, len(prompt) :]
    if not torch.equal(best.indices[:, 0], continuation):
        raise ValueError("generation with a cache and one forward pass disagree")
    return continuation.numpy()


@torch.no_grad()
def compute_expected(model: transformers.PreTrainedModel, seed: int) -> dict[str, np.ndarray]:
    """All arrays of `golden_cases.Expected`; UnsuitableSeedError if `seed` will not do."""
    rng = np.random.default_rng([seed, 1])
    vocab_size = model.config.vocab_size
    tap = RouterTap(model)
    input_ids = rng.integers(0, vocab_size, (BATCH, LENGTH))
    logits = model(input_ids=torch.from_numpy(input_ids), use_cache=False).logits.numpy()
    topk_ids = np.stack(tap.ids).reshape(tap.num_layers, BATCH, LENGTH, -1)
    prompts = [rng.integers(0, vocab_size, length) for length in RAGGED_LENGTHS]
    greedy = np.stack([greedy_continuation(model, prompt) for prompt in prompts])
    if tap.min_gap < MIN_ROUTING_GAP:
        raise UnsuitableSeedError("two experts score nearly the same")
    tap.close()

    left_ids, left_mask = pad(prompts, "left", rng, vocab_size)
    right_ids, right_mask = pad(prompts, "right", rng, vocab_size)
    together = model.generate(
        left_ids, attention_mask=left_mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    if not np.array_equal(together[:, left_ids.shape[1] :].numpy(), greedy):
        raise ValueError("prompts generated alone and as a padded batch disagree")
    if min(len(np.unique(row)) for row in greedy) < MIN_DISTINCT_TOKENS:
        raise UnsuitableSeedError("a greedy text hardly varies")
    integers = dict(
        input_ids=input_ids,
        topk_ids=topk_ids,
        lengths=np.array(RAGGED_LENGTHS),
        left_input_ids=left_ids.numpy(),
        left_attention_mask=left_mask.numpy(),
        right_input_ids=right_ids.numpy(),
        right_attention_mask=right_mask.numpy(),
        greedy_tokens=greedy,
    )
    floats = dict(
        logits=logits,
        left_logits=padded_logits(model, left_ids, left_mask),
        right_logits=padded_logits(model, right_ids, right_mask),
    )
    return {name: array.astype(np.int32) for name, array in integers.items()} | floats


def find_seed(spec: GoldenSpec) -> tuple[int, transformers.PreTrainedModel, dict[str, np.ndarray]]:
    """The first suitable seed, with its model and results."""
    base = zlib.crc32(f"{spec.family}/{spec.name}".encode()) % 1_000_000
    for seed in range(base, base + 100):
        model = build_model(spec, seed)
        try:
            return seed, model, compute_expected(model, seed)
        except UnsuitableSeedError as error:
            print(f"  seed {seed}: {error}")
    raise RuntimeError(f"no suitable seed for {spec.family}/{spec.name}")


def mtp_tensors(model: transformers.PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Tensors as a published multi-token-prediction layer has them, after the last decoder layer."""
    hidden, prefix = model.config.hidden_size, f"model.layers.{model.config.num_hidden_layers}."
    shapes = {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
    }
    rng = np.random.default_rng([seed, 2])
    return {prefix + name: torch.from_numpy(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def save_form(spec: GoldenSpec, form: str, model: transformers.PreTrainedModel, folder: Path, seed: int) -> None:
    """Write `model` as a Hugging Face folder in `form`."""
    stored = copy.deepcopy(model).to(DTYPES[spec.dtype])
    for name, buffer in stored.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = model.get_buffer(name).clone()
    shards = {"max_shard_size": MAX_SHARD_SIZE} if form in spec.sharded else {}
    stored.save_pretrained(folder, save_original_format=form != "fused", **shards)
    (folder / "README.md").unlink(missing_ok=True)
    if spec.mtp_layer:
        tensors = load_file(folder / "model.safetensors")
        extra = {name: value.to(DTYPES[spec.dtype]) for name, value in mtp_tensors(model, seed).items()}
        save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    if form == "mxfp4":
        store_mxfp4_experts(folder)
    if form == "block_fp8":
        quantize_block_fp8(folder, spec.fp8_block)


def same_logits(folder: Path, expected: dict[str, np.ndarray], **options) -> None:
    """Raise unless `transformers` loads `folder` and computes the expected logits."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **options,
    )
    if report["missing_keys"]:
        raise ValueError(f"{folder}: transformers misses {sorted(report['missing_keys'])}")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(expected["input_ids"]).long(), use_cache=False).logits.numpy()
    error = np.abs(logits - expected["logits"]).max() / expected["logits"].std()
    if not error <= 2e-6:
        raise ValueError(f"{folder}: logits differ from the expected ones by {error:.1e} standard deviations")


def check_forms(spec: GoldenSpec, case_folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Every form, and the hub-style configuration, loads in `transformers` and computes the same."""
    for form in spec.forms:
        if form == "block_fp8":
            continue  # transformers cannot dequantize ragged blocks; `round_to_block_fp8` made the weights exact
        same_logits(case_folder / form, expected)
    with tempfile.TemporaryDirectory() as scratch:
        plain = next(form for form in spec.forms if form != "mxfp4")
        folder = Path(shutil.copytree(case_folder / plain, Path(scratch) / "hub"))
        if plain != "block_fp8":
            shutil.copy(case_folder / "config_hub_style.json", folder / "config.json")
            same_logits(folder, expected)


def make_case(spec: GoldenSpec) -> None:
    """Write `tests/golden/<family>/<case>/`."""
    print(f"{spec.family}/{spec.name}")
    case_folder = ROOT / spec.family / spec.name
    shutil.rmtree(case_folder, ignore_errors=True)
    seed, model, expected = find_seed(spec)
    for form in spec.forms:
        save_form(spec, form, model, case_folder / form, seed)
    np.savez_compressed(case_folder / "expected.npz", **expected)
    written = json.loads((case_folder / spec.forms[0] / "config.json").read_text())
    write_json(case_folder / "config_hub_style.json", hub_style_config(written))
    description = dict(
        covers=spec.covers,
        forms=list(spec.forms),
        dtype=spec.dtype,
        seed=seed,
        dropped_tensors=sorted(mtp_tensors(model, seed)) if spec.mtp_layer else [],
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    write_json(case_folder / "case.json", description)
    check_forms(spec, case_folder, expected)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="family[/case]", help="which cases to make (default: all)")
    wanted = parser.parse_args().cases
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    specs = [spec for spec in SPECS if not wanted or spec.family in wanted or f"{spec.family}/{spec.name}" in wanted]
    if not specs:
        raise SystemExit(f"no such case; there are {', '.join(f'{spec.family}/{spec.name}' for spec in SPECS)}")
    for spec in specs:
        make_case(spec)


if __name__ == "__main__":
    main()
