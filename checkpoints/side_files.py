"""The small files that travel with a model: configuration, generation settings, tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .safetensors_folder import read_json_object

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_side_files(reader: Checkpoint, target: Path, config: Mapping[str, Any]) -> None:
    """Put `config` as `config.json`, and what else belongs to `reader`, into `target`."""
    original = None if reader.folder is None else reader.folder / "config.json"
    if original is not None and original.exists() and read_json_object(original) == config:
        shutil.copyfile(original, target / "config.json")
    else:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in SIDE_FILES:
        if reader.folder is not None and (reader.folder / name).is_file():
            shutil.copyfile(reader.folder / name, target / name)
