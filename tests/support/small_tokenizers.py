"""Tokenizers of the kinds that checkpoints have, small enough to be made on the spot."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

END_OF_TEXT = "<|end|>"

CHATML = """\
{% for message in messages %}
<|{{ message.role }}|>{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}
"""


def byte_level(*, extra_tokens: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """One token per byte (ids 0 to 255, in the order of the byte-level alphabet), then `extra_tokens`, then `END_OF_TEXT`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(extra_tokens))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def sentencepiece_like(words: tuple[str, ...]) -> tokenizers.Tokenizer:
    """As Mixtral's: pieces with a leading "▁", bytes for everything else, a beginning-of-sequence token before every text."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁"] + [f"▁{word}" for word in words] + sorted({letter for word in words for letter in word})
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    # Unigram with equal scores takes the fewest pieces, so whole words win.
    tokenizer = tokenizers.Tokenizer(
        models.Unigram([(piece, -1.0) for piece in vocab], unk_id=vocab["<unk>"], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def one_word_per_token(vocab_size: int) -> tokenizers.Tokenizer:
    """Token i is the word "w<i>", for models whose vocabulary has no meaning."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    return tokenizer


def write(tokenizer: tokenizers.Tokenizer, folder: Path, **config: Any) -> Path:
    """Write `tokenizer.json` and a `tokenizer_config.json` with `config` into `folder`; returns `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
