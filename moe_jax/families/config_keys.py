"""Which keys of a `config.json` are understood: one that might change the result and isn't known is refused by name."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.families.config_types import CONFIG_TYPES
from moe_jax.families.rope import ROPE_KEYS
from moe_jax.families.settings import HFConfig, Key, resolve
from moe_jax.json_types import check_types

HARMLESS_KEYS = frozenset(
    {
        # about the file, not the model
        "_commit_hash", "_name_or_path", "architectures", "auto_map", "dtype", "model_type", "name_or_path",
        "torch_dtype", "transformers_version", "quantization_config", "unsloth_fixed", "unsloth_version",
        # how PyTorch or TensorFlow run it
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation",
        "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
        "chunk_size_feed_forward", "gradient_checkpointing", "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache",
        # tokens and outputs
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
        "output_attentions", "output_hidden_states", "output_past", "output_router_logits", "return_dict",
        # other tasks than language modelling, and parts of encoder-decoders
        "cross_attention_hidden_size", "finetuning_task", "id2label", "label2id", "num_labels", "prefix", "problem_type",
        "task_specific_params", "tie_encoder_decoder",
        # generation, which older files set here: its own file counts
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        # training only
        "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "aux_loss_alpha",
        "seq_aux", "router_aux_loss_coef", "pretraining_tp", "num_nextn_predict_layers", "num_mtp_layers", "ep_size",
        # read by every decoder
        "hidden_size", "num_hidden_layers", "hidden_act", "vocab_size", "max_position_embeddings",
    }
)  # fmt: skip
"""Keys that no family needs to name: they never change the result, or every decoder reads them."""

ONLY_DECODERS: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
"""Keys that would make another kind of model -> the values under which they don't."""


def check_keys(row: Any, config: HFConfig) -> None:
    """Raise ValueError naming every key of `config` that `row` neither reads nor knows to be harmless, or of a wrong type."""
    check_types(config, CONFIG_TYPES, file="config.json")
    legal = {**ONLY_DECODERS, **resolve(row.refused, config)}
    known = HARMLESS_KEYS | set(ROPE_KEYS) | set(row.read) | set(row.ignored) | set(_setting_names(row)) | set(legal)
    given = {name: value for name, value in config.items() if value is not None}
    problems = [
        f"{name}={value!r} (supported: {', '.join(map(repr, legal[name]))})"
        for name, value in given.items()
        if name in legal and value not in legal[name]
    ]
    problems += [f"{name}={value!r} (unknown key)" for name, value in given.items() if name not in known]
    if problems:
        raise ValueError("config.json has settings that are not supported: " + "; ".join(problems))


def _setting_names(value: Any) -> Iterator[str]:
    """Every spelling of every `Key` inside a row."""
    if isinstance(value, Key):
        yield from value.names
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _setting_names(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _setting_names(getattr(value, field.name))
