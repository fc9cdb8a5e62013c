"""Copies the small files that travel with a model: configuration, generation settings, tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .checkpoint_json import read_checkpoint_json
from .file_names import CONFIG_NAME, SIDE_FILES


def copy_side_files(reader: Checkpoint, target: Path, config: Mapping[str, Any]) -> None:
    """Put `config` as `config.json`, and what else belongs to `reader`, into `target`."""
    original = None if reader.folder is None else reader.folder / CONFIG_NAME
    if original is not None and original.exists() and read_checkpoint_json(original) == config:
        shutil.copyfile(original, target / CONFIG_NAME)
    else:
        (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in SIDE_FILES:
        if reader.folder is not None and (reader.folder / name).is_file():
            shutil.copyfile(reader.folder / name, target / name)
