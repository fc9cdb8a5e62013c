"""Names of the files of a model: Hugging Face's, and those of a converted folder."""

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MANIFEST_NAME = "moe_jax.json"
PARTS_FOLDER = "parts"

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "chat_template.jsonl",
)
"""Small files that travel with a model: generation settings, tokenizer, chat template."""
