"""Text to token ids and back, with the tokenizer files of a Hugging Face checkpoint (no `transformers`)."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moe_jax.chat_template import ChatTemplate
from moe_jax.json_files import read_json_object

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for bytes that are not (yet) a whole UTF-8 character."""

OTHER_TOKENIZER_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model")
"""Forms of tokenizers that are not read."""

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a checkpoint: `tokenizer.json`, its special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        """Wrap a tokenizer.

        Args:
            backend: the tokenizer proper.
            special_tokens: text of "bos_token", "eos_token", ...; chat templates use them.
            chat_template: Jinja source that turns messages into a prompt; None if the checkpoint has none.
        """
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_template_source = chat_template
        # A stored truncation or padding belongs to training; prompts are taken as they are.
        self.backend.no_truncation()
        self.backend.no_padding()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read the tokenizer of a checkpoint folder (Hugging Face's or a converted one).

        Raises:
            FileNotFoundError: there is no `tokenizer.json`; the message names what is there instead.
            ValueError: one of the files is not what it should be.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(_no_tokenizer_message(folder))
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        special_tokens = _special_tokens(folder / "special_tokens_map.json")
        special_tokens |= _special_tokens(folder / "tokenizer_config.json")
        config = _read_if_present(folder / "tokenizer_config.json")
        return cls(backend, special_tokens=special_tokens, chat_template=_chat_template_source(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the tokens that the tokenizer puts around every text unless told otherwise."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def continuation(self, prompt_ids: Sequence[int], token_ids: Iterable[int]) -> str:
        """What `token_ids` add to the text of `prompt_ids`, leading space included, which `decode` may drop."""
        stream = TextStream(self, prompt_ids)
        return "".join([stream.add(token) for token in token_ids] + [stream.finish()])

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template; ValueError if it has none, or not a valid one."""
        if self._chat_template_source is None:
            raise ValueError(
                "the checkpoint has no chat template: neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json"
            )
        return ChatTemplate(self._chat_template_source)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant's next message begins.

        Args:
            messages: each with "role" ("system", "user", "assistant") and "content".
            **variables: further variables of the template, such as `enable_thinking=False` for Qwen3.

        Raises:
            ValueError: there is no chat template, or it rejects these messages.
        """
        variables = {**self.special_tokens, **variables}
        text = self.chat_template.render(messages, add_generation_prompt=True, **variables)
        return self.encode(text, add_special_tokens=False)  # the template writes them


class TextStream:
    """Turns tokens into text as they come: whole characters only, and the pieces add up to the whole text.

    Decoding tokens one by one would break characters whose bytes are spread over tokens and lose the spaces that some
    tokenizers keep at the front of words. So a short run of tokens is decoded again with each new one, and only what
    that adds is given out, once it ends in a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """Start a text.

        Args:
            tokenizer: decodes.
            context: tokens in front of the first, whose text is not given out.
        """
        self._decode = tokenizer.decode
        self._window = list(context)
        self._num_given_out = len(self._window)

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is not whole."""
        self._window.append(token_id)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        del self._window[: self._num_given_out]
        self._num_given_out = len(self._window)
        return text

    def finish(self) -> str:
        """What is left at the end: U+FFFD for characters that never became whole."""
        return self._pending()

    def _pending(self) -> str:
        given_out = self._decode(self._window[: self._num_given_out])
        return self._decode(self._window)[len(given_out) :]


def _no_tokenizer_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder"
    found = [name for name in OTHER_TOKENIZER_FILES if (folder / name).exists()]
    if not found:
        return f"{folder} has no tokenizer.json"
    return (
        f"{folder} has no tokenizer.json, only {', '.join(found)}, which is not read; where transformers is installed, "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
    )


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _special_tokens(file: Path) -> dict[str, str]:
    """Special tokens in `file` as text; it holds the text itself or an object with "content"."""
    config = _read_if_present(file)
    values = {name: config[name] for name in SPECIAL_TOKEN_NAMES if config.get(name) is not None}
    texts: dict[str, str] = {}
    for name, value in values.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(text, str):
            raise ValueError(f'{file}: {name} must be a text or an object with "content", got {value!r}')
        texts[name] = text
    return texts


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, or `chat_template` of tokenizer_config.json: a text, or named texts with one "default"."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    file = folder / "tokenizer_config.json"
    if not isinstance(template, list) or not all(map(_is_named_template, template)):
        raise ValueError(f'{file}: chat_template must be a text or a list of objects with "name" and "template"')
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise ValueError(f"{file} has the chat templates {', '.join(sorted(named))}, but none called 'default'")
    return named["default"]


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
