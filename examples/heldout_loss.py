"""How well does the demo model predict text that it has never seen?

    python examples/heldout_loss.py MODEL

MODEL is `examples/demo_model`, converted or not. The held-out chapters are cut into consecutive windows, and in each
every token but the first is predicted. Prints the mean loss, beside the one that `transformers` computed when the model
was made; the exit status is 1 if they differ.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax import from_pretrained
from moe_jax.models import CausalLM
from moe_jax.tokenization import Tokenizer

HERE = Path(__file__).parent
HELDOUT_TEXT = HERE / "heldout.txt"
REPORT = HERE / "demo_model" / "training_report.json"
END_OF_TEXT = "<|endoftext|>"
TOLERANCE = 1e-3
"""Largest accepted difference of the two losses, in nats per token."""


def heldout_windows(tokenizer: Tokenizer, window: int) -> Int[np.ndarray, "N S"]:
    """The held-out chapters as token ids, each chapter closed by the end-of-text token; a shorter rest is left out."""
    chapters = HELDOUT_TEXT.read_text(encoding="utf-8").removesuffix("\n").split("\n\n\n")
    tokens = np.array([token for chapter in chapters for token in tokenizer.encode(chapter + END_OF_TEXT)])
    return tokens[: len(tokens) // window * window].reshape(-1, window)


@nnx.jit
def mean_loss(model: CausalLM, windows: Int[Array, "N S"]) -> Float[Array, ""]:
    """Mean next-token cross entropy, in nats per predicted token."""
    log_probabilities = jax.nn.log_softmax(model(windows)[:, :-1], axis=-1)
    return -jnp.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1).mean()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="the demo model, as it is or converted")
    folder = parser.parse_args().model
    report = json.loads(REPORT.read_text(encoding="utf-8"))

    windows = heldout_windows(Tokenizer.from_folder(folder), report["window"])
    loss = float(mean_loss(from_pretrained(folder, dtype=jnp.float32), jnp.asarray(windows)))
    recorded = report["loss_nats_per_token"]["heldout"]
    predicted = windows.size - len(windows)
    print(f"held-out loss: {loss:.4f} nats per token (perplexity {math.exp(loss):.1f}) over {predicted} tokens")
    print(f"transformers computed {recorded:.4f}; guessing evenly would give {math.log(report['vocabulary']):.4f}")
    return 0 if abs(loss - recorded) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
