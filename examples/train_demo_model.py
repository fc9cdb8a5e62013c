"""Train the demo model: a small Qwen3-MoE on one public-domain novel, saved as `transformers` saves any checkpoint.

    .venv-golden/bin/python examples/train_demo_model.py [--steps 6000] [--minutes 60]

runs in the environment that `make golden-env` creates (torch, transformers, tokenizers). It writes `demo_model/`
(checkpoint in bfloat16 with its tokenizer), `heldout.txt` (text never trained on) and
`demo_model/training_report.json` beside this file.

The chapters are split three ways: most are trained on, a few choose the best step (validation), and two are held out
entirely: the loss that the report quotes is theirs, and neither the tokenizer nor the choice of step has seen them.
"""

import argparse
import json
import lzma
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch  # noqa: TID251
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
TEXT = HERE / "demo_text.txt.xz"
MODEL = HERE / "demo_model"
HELDOUT_TEXT = HERE / "heldout.txt"
PROMPTS = HERE / "prompts.txt"

HELDOUT_CHAPTERS = ("CHAPTER 51.", "CHAPTER 61.")
VALIDATION_CHAPTERS = ("CHAPTER 12.", "CHAPTER 47.", "CHAPTER 80.", "CHAPTER 116.")
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 128
BATCH = 8
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.03
"""Part of the training in which the learning rate rises."""
VALIDATE_EVERY = 200
SEED = 20


def read_chapters() -> dict[str, list[str]]:
    """The novel's chapters, split into "train", "validation" and "heldout"."""
    text = lzma.decompress(TEXT.read_bytes()).decode()
    splits: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    for chapter in text.strip().split("\n\n\n"):
        heldout, validation = chapter.startswith(HELDOUT_CHAPTERS), chapter.startswith(VALIDATION_CHAPTERS)
        splits["heldout" if heldout else "validation" if validation else "train"].append(chapter)
    found = {name: len(chapters) for name, chapters in splits.items()}
    if (found["heldout"], found["validation"]) != (len(HELDOUT_CHAPTERS), len(VALIDATION_CHAPTERS)):
        raise ValueError(f"the chapters to set aside were not all found in {TEXT}: {found}")
    return splits


def check_prompts(training_text: str) -> list[str]:
    """The demo's prompts; ValueError if one occurs in the training text, whatever its case and spacing."""
    flat = re.sub(r"\s+", " ", training_text).lower()
    prompts = PROMPTS.read_text().splitlines()
    for prompt in prompts:
        if re.sub(r"\s+", " ", prompt).strip().lower() in flat:
            raise ValueError(f"the prompt {prompt!r} of {PROMPTS} occurs in the training text")
    return prompts


def train_tokenizer(chapters: list[str]) -> Tokenizer:
    """Byte-level BPE over the training chapters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> torch.Tensor:
    """Token ids of the chapters, one after another, each closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor([token for chapter in chapters for token in [*tokenizer.encode(chapter).ids, end]])


def new_model(end_of_text: int) -> transformers.PreTrainedModel:
    """About 2.8 million parameters, 0.8 million of them active per token."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def windows(tokens: torch.Tensor) -> torch.Tensor:
    """Consecutive, non-overlapping windows of `CONTEXT` tokens; a shorter rest is left out."""
    return tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


@torch.no_grad()
def mean_loss(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean next-token cross entropy, in nats per predicted token, over windows of `CONTEXT` tokens."""
    model.eval()
    total, count = 0.0, 0
    for batch in windows(tokens).split(BATCH):
        logits = model(input_ids=batch).logits[:, :-1].float()
        targets = batch[:, 1:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    model.train()
    return total / count


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak; `progress` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * max(progress / WARMUP, 0.01)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))))


def train(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, validation: torch.Tensor, steps: int, seconds: float
) -> tuple[int, int, float]:
    """Train for `steps` or `seconds`, whichever ends first, and leave the weights of the best validation loss.

    Returns (steps taken, best step, its validation loss). The learning rate follows whichever limit is nearer.
    """
    rng = np.random.default_rng(SEED)
    optimizer = optimizer_for(model)
    best_step, best_loss, best_weights = 0, math.inf, None
    started = time.perf_counter()
    step, progress = 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        starts = rng.integers(0, len(tokens) - CONTEXT, BATCH)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.perf_counter() - started
        progress = max(step / steps, elapsed / seconds)
        if step % VALIDATE_EVERY == 0 or progress >= 1:
            validation_loss = mean_loss(model, validation)
            print(
                f"step {step}: train {loss.item():.3f}, validation {validation_loss:.3f}, {elapsed:.0f} s", flush=True
            )
            if validation_loss < best_loss:
                best_step, best_loss = step, validation_loss
                best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return step, best_step, best_loss


@torch.no_grad()
def expert_shares(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest share of tokens that any expert of any layer receives (even: top_k / num_experts)."""
    batch = windows(tokens)[:BATCH]
    logits = model(input_ids=batch, output_router_logits=True).router_logits
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    counts = torch.stack([layer.topk(top_k, dim=-1).indices.flatten().bincount(minlength=experts) for layer in logits])
    shares = counts / batch.numel()
    return shares.min().item(), shares.max().item()


def save(model: transformers.PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Write the checkpoint, in bfloat16, with its tokenizer and generation settings."""
    shutil.rmtree(MODEL, ignore_errors=True)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    model.to(torch.bfloat16).save_pretrained(MODEL)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model.config.max_position_embeddings,
    )
    fast.save_pretrained(MODEL)


def samples(prompts: list[str]) -> dict[str, str]:
    """A sampled continuation of each prompt, from the saved folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    texts = {}
    for prompt in prompts:
        torch.manual_seed(SEED)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60)
        texts[prompt] = tokenizer.decode(output[0])
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="most optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="most minutes of training (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; matrices are small (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()

    splits = read_chapters()
    prompts = check_prompts("\n".join(splits["train"]))
    tokenizer = train_tokenizer(splits["train"])
    tokens = {name: encode(tokenizer, chapters) for name, chapters in splits.items()}
    HELDOUT_TEXT.write_text("\n\n\n".join(splits["heldout"]) + "\n")
    model = new_model(tokenizer.token_to_id(END_OF_TEXT))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.2f} million parameters; tokens: { {name: len(ids) for name, ids in tokens.items()} }",
        flush=True,
    )

    limits = (arguments.steps, 60 * arguments.minutes)
    steps, best_step, validation_loss = train(model, tokens["train"], tokens["validation"], *limits)
    save(model, tokenizer)
    saved = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    heldout_loss = mean_loss(saved, tokens["heldout"])
    heldout_bytes = sum(len(chapter.encode()) for chapter in splits["heldout"])
    report = dict(
        parameters=parameters,
        tokens={name: len(ids) for name, ids in tokens.items()},
        steps=steps,
        best_step=best_step,
        loss_nats_per_token=dict(
            train=mean_loss(saved, tokens["train"][: len(tokens["heldout"])]),
            validation=validation_loss,
            heldout=heldout_loss,
        ),
        heldout_bits_per_byte=heldout_loss / math.log(2) * len(tokens["heldout"]) / heldout_bytes,
        vocabulary=VOCABULARY,
        window=CONTEXT,
        expert_share_smallest_and_largest=expert_shares(saved, tokens["heldout"]),
        samples=samples(prompts),
        versions=dict(torch=torch.__version__, transformers=transformers.__version__),
    )
    (MODEL / "training_report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
