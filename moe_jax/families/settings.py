"""How a family row refers to `config.json`: a setting is a constant or a `Key` that is looked up when a checkpoint is read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

HFConfig = Mapping[str, Any]
"""The content of a Hugging Face `config.json`."""

REQUIRED: Any = object()
"""Default of a key that every `config.json` of the family must have."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A value of `config.json`, under any of several spellings; null counts as absent."""

    names: tuple[str, ...]
    default: Any = REQUIRED
    """Value, or function of the whole config, when no spelling is present."""

    def look_up(self, config: HFConfig) -> Any:
        """The value in `config`, or the default; KeyError naming every spelling when a required key is absent."""
        for name in self.names:
            if config.get(name) is not None:
                return config[name]
        if self.default is REQUIRED:
            raise KeyError(f"config.json has no {' or '.join(self.names)}")
        return self.default(config) if callable(self.default) else self.default


Setting = Any
"""A constant, a `Key`, or a function of the whole config."""


def key(*names: str, default: Any = REQUIRED) -> Key:
    """A `Key` with the spellings `names`."""
    return Key(names, default)


def resolve(setting: Setting, config: HFConfig) -> Any:
    """The value of a setting for this `config.json`; dataclasses and mappings are resolved field by field."""
    if isinstance(setting, Key):
        return setting.look_up(config)
    if isinstance(setting, Mapping):
        return {name: resolve(value, config) for name, value in setting.items()}
    if isinstance(setting, Callable):
        return setting(config)
    return setting
