"""How a family row refers to `config.json`: a setting is a constant, or a `Key` looked up when a checkpoint is read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

HFConfig = Mapping[str, Any]
"""The content of a Hugging Face `config.json`."""

_NOT_GIVEN: Any = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A value of `config.json`, under any of several spellings."""

    names: tuple[str, ...]
    default: Any = _NOT_GIVEN
    """Setting that takes over when no spelling is present; without one, the key is required."""
    null: Any = _NOT_GIVEN
    """Setting that takes over when the value is null; without one, null counts as absent."""

    def look_up(self, config: HFConfig) -> Any:
        """The value in `config`, or the default.

        Raises:
            ValueError: spellings have different values, or a required key is absent under every spelling.
        """
        given = {name: config[name] for name in self.names if config.get(name) is not None}
        if any(value != other for value in given.values() for other in given.values()):
            contradiction = " and ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"config.json: {contradiction} contradict each other")
        if given:
            return next(iter(given.values()))
        if self.null is not _NOT_GIVEN and any(name in config for name in self.names):
            return resolve(self.null, config)
        if self.default is _NOT_GIVEN:
            raise ValueError(f"config.json has no {' or '.join(self.names)}")
        return resolve(self.default, config)


Setting = Any
"""A constant, a `Key`, or a function of the whole config."""


def key(*names: str, default: Setting = _NOT_GIVEN, null: Setting = _NOT_GIVEN) -> Key:
    """A `Key` with the spellings `names`."""
    return Key(names, default, null)


def resolve(setting: Setting, config: HFConfig) -> Any:
    """The value of a setting for this `config.json`; mappings are resolved item by item."""
    if isinstance(setting, Key):
        return setting.look_up(config)
    if isinstance(setting, Mapping):
        return {name: resolve(value, config) for name, value in setting.items()}
    if isinstance(setting, Callable):
        return setting(config)
    return setting
