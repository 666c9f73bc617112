"""A dict with attribute access whose missing known keys read as None."""

from __future__ import annotations

from typing import Any

from eft.config.axolotl_keys import AXOLOTL_KEYS
from eft.config.data import DatasetConfig
from eft.config.root import TrainConfig
from eft.core.errors import nearest

KNOWN_KEYS = frozenset(TrainConfig.model_fields) | frozenset(DatasetConfig.model_fields) | frozenset(AXOLOTL_KEYS)


def _wrap(value: Any) -> Any:
    if isinstance(value, dict) and not isinstance(value, DictDefault):
        return DictDefault(value)
    if isinstance(value, list):
        return [_wrap(item) for item in value]
    return value


class DictDefault(dict[str, Any]):
    """A mutable config. A misspelt attribute is an AttributeError here, not a silent None."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __missing__(self, key: str) -> None:
        return None

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _wrap(value))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As `dict.update`; nested mappings become DictDefault too."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As `dict.setdefault`, with the wrapping of `update`."""
        if key not in self:
            self[key] = default
        return self[key]

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        if key in KNOWN_KEYS:
            return None
        close = nearest(key, KNOWN_KEYS)
        raise AttributeError(f"{key!r} is no config key{f'; did you mean {close!r}?' if close else ''}")

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        del self[key]

    def __or__(self, other: Any) -> DictDefault:
        """Both together; where both have a key, the left one's value stays, as Axolotl's programs expect."""
        return DictDefault({**other, **self})

    def copy(self) -> DictDefault:
        """A shallow copy."""
        return DictDefault(self)
