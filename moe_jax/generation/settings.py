"""What a generation is asked to do, and what a checkpoint's `generation_config.json` says about it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config_checks import check_booleans, check_integer, check_kind, is_finite_number, is_integer
from moe_jax.json_files import read_json_object
from moe_jax.json_types import BOOLEAN, INTEGER, INTEGER_OR_INTEGERS, NUMBER, POSITIVE_INTEGER, JSONType, check_types

FILE = "generation_config.json"

DEFAULT_NEW_TOKENS = 128
"""How many tokens are generated at most when neither the caller nor the checkpoint says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How tokens are chosen and when a row ends."""

    max_new_tokens: int | None = None
    """A row ends after this many new tokens; None: `default_new_tokens`."""
    default_new_tokens: int = DEFAULT_NEW_TOKENS
    """What `max_new_tokens` is if it is None, or less where the model's positions don't allow so many."""
    do_sample: bool = False
    """Draw tokens at random; otherwise take the most likely one, and the three settings below have no effect."""
    temperature: float = 1.0
    """Logits are divided by this before `top_k` and `top_p`; below 1 sharpens, above 1 flattens."""
    top_k: int | None = None
    """Draw from this many of the most likely tokens; None: from all."""
    top_p: float | None = None
    """Draw from the smallest set of tokens that reaches this probability; 1 or None: from all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the row already holds, in its prompt or after it, are divided by this where positive and
    multiplied where negative, before anything else; above 1 discourages repetition, 1 changes nothing."""
    eos_token_ids: tuple[int, ...] = ()
    """A row ends with the first of these; the token itself is part of the result."""
    pad_token_id: int = 0
    """Fills the result after a row has ended."""

    def __post_init__(self) -> None:
        check_booleans(self)
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens, least=1, must="be at least 1")
        check_integer("default_new_tokens", self.default_new_tokens, least=1, must="be at least 1")
        if not (is_finite_number(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature must be positive and finite, got {self.temperature!r}; greedy decoding needs none"
            )
        if not (is_finite_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be positive and finite, got {self.repetition_penalty!r}")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, least=1, must="be at least 1, or None for all tokens")
        if self.top_p is not None and not (is_finite_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], or None for all tokens; got {self.top_p!r}")
        check_kind("eos_token_ids", self.eos_token_ids, tuple, list)
        if not all(is_integer(token) and 0 <= token < 2**31 for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids must be integers from 0 to 2^31 - 1, got {self.eos_token_ids}")
        if not (is_integer(self.pad_token_id) and -(2**31) <= self.pad_token_id < 2**31):
            raise ValueError(f"pad_token_id must be an integer from -2^31 to 2^31 - 1, got {self.pad_token_id!r}")


NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "watermarking_config": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "max_time": (),
}
"""Settings of Hugging Face's `GenerationConfig` that are not supported, and the values (beside null) with which they
do nothing."""

NEUTRAL_VALUES_WHEN_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
}
"""The same for settings that have an effect only when tokens are drawn at random."""


def refuse_unsupported(generation_config: Mapping[str, Any], *, sampling: bool) -> None:
    """Raise ValueError if `generation_config` asks for something that would change the result and is not supported."""
    neutral_values = {**NEUTRAL_VALUES, **(NEUTRAL_VALUES_WHEN_SAMPLING if sampling else {})}
    unsupported = [
        f"{name}={generation_config[name]!r}"
        for name, neutral in neutral_values.items()
        if generation_config.get(name) is not None and generation_config[name] not in neutral
    ]
    if unsupported:
        raise ValueError(
            f"generation_config.json asks for {', '.join(unsupported)}, which is not supported (supported are "
            f"{', '.join(SETTING_TYPES)}); leave the file aside with --ignore-generation-config "
            "(ignore_generation_config=True)"
        )


SETTING_TYPES: Mapping[str, JSONType] = {
    "max_new_tokens": POSITIVE_INTEGER,
    "do_sample": BOOLEAN,
    "temperature": NUMBER,
    "top_k": INTEGER,
    "top_p": NUMBER,
    "repetition_penalty": NUMBER,
    "eos_token_id": INTEGER_OR_INTEGERS,
    "pad_token_id": INTEGER,
}
"""Supported settings and their types in a file."""

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p")
"""Those that have an effect only when tokens are drawn at random."""

FIELDS = {"eos_token_id": "eos_token_ids"}
"""Settings that have another name in `GenerationSettings`."""


def token_ids(setting: int | list[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` as Hugging Face writes it (null, an int, or a list of ints) as a tuple."""
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, list) else (setting,)


def settings_from_hf(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], **overrides: Any
) -> GenerationSettings:
    """The settings that a checkpoint asks for, with the caller's own instead where given.

    A `top_k` that the file leaves out restricts nothing (as in vLLM; `transformers` would take 50). `max_length`,
    which counts the prompt too, is not read: `max_new_tokens` takes its place. What has no effect, because nothing is drawn or
    the caller gives another value, is not looked at.

    Args:
        generation_config: content of `generation_config.json`; empty if the checkpoint has none.
        config: content of `config.json`, where older checkpoints keep `eos_token_id` and `pad_token_id`.
        **overrides: fields of `GenerationSettings`; those that are not None win over the checkpoint's.

    Raises:
        ValueError: the checkpoint asks for something that would change the result and is not supported, a value is
            illegal or of the wrong type, or the caller restricts what is drawn although nothing is.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}

    def not_overridden(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {n: value for n, value in settings.items() if value is not None and FIELDS.get(n, n) not in overrides}

    given = not_overridden({name: generation_config.get(name) for name in SETTING_TYPES})
    inherited = not_overridden({n: config.get(n) for n in ("eos_token_id", "pad_token_id") if n not in given})
    do_sample = overrides.get("do_sample", given.get("do_sample", False))
    if given.get("temperature") == 0:  # in use for "greedy", as `top_k: 0` is for "all tokens"
        del given["temperature"]
        do_sample = overrides.get("do_sample", False)
    if not do_sample:
        given = {name: value for name, value in given.items() if name not in SAMPLING_SETTINGS}
        if ignored := [name for name in SAMPLING_SETTINGS if name in overrides]:
            raise ValueError(
                f"{', '.join(ignored)} would have no effect: greedy decoding draws nothing; set do_sample=True"
            )
    check_types(given, SETTING_TYPES, file=FILE)
    check_types(inherited, SETTING_TYPES, file="config.json")
    settings = {
        **_fields(given, file=FILE),
        **_fields(inherited, file="config.json"),
        "do_sample": do_sample,
        **overrides,
    }
    if "pad_token_id" not in settings:
        settings["pad_token_id"] = next(iter(settings.get("eos_token_ids", ())), 0)
    refuse_unsupported(generation_config, sampling=do_sample)
    return GenerationSettings(**settings)


def _fields(given: Mapping[str, Any], *, file: str) -> dict[str, Any]:
    """Settings of `file`, of the right types, as fields of `GenerationSettings`; ValueError naming the file if one is illegal."""
    fields = dict(given)
    if "max_new_tokens" in fields:  # made for other prompts, whose lengths left so much room
        fields["default_new_tokens"] = fields.pop("max_new_tokens")
    if "top_k" in fields:
        fields["top_k"] = fields["top_k"] or None
    if "eos_token_id" in fields:
        fields["eos_token_ids"] = token_ids(fields.pop("eos_token_id"))
    try:
        GenerationSettings(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return fields


def read_generation_settings(
    folder: str | os.PathLike[str], *, ignore_generation_config: bool = False, **overrides: Any
) -> GenerationSettings:
    """`settings_from_hf` of a checkpoint folder (Hugging Face's or a converted one).

    Args:
        folder: the checkpoint.
        ignore_generation_config: go on as if there was no `generation_config.json`; the tokens that end a row are then
            those of `config.json`, which may be fewer.
        **overrides: see `settings_from_hf`.

    Raises:
        FileNotFoundError: the folder has no `config.json`.
        ValueError: a file is not JSON, or see `settings_from_hf`.
    """
    folder = Path(folder)
    generation_config_file = folder / FILE
    is_read = not ignore_generation_config and generation_config_file.exists()
    generation_config = read_json_object(generation_config_file) if is_read else {}
    return settings_from_hf(generation_config, read_json_object(folder / "config.json"), **overrides)
