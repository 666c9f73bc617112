"""A dict with attribute access whose missing known keys read as None."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from eft.config.axolotl_keys import AXOLOTL_DATASET_KEYS, AXOLOTL_KEYS, COMPUTED, ELSEWHERE, RENAMED
from eft.config.data import DatasetConfig
from eft.config.root import TrainConfig
from eft.core.errors import nearest

KNOWN_KEYS = frozenset(
    {
        *TrainConfig.model_fields,
        *DatasetConfig.model_fields,
        *AXOLOTL_KEYS,
        *AXOLOTL_DATASET_KEYS,
        *COMPUTED,
        *ELSEWHERE,
        *RENAMED,
    }
)
"""Every name that a config or an entry of its data sets may have, in eft or in Axolotl."""

_LISTS_OF_SECTIONS = ("datasets", "test_datasets")


class DictDefault(dict[str, Any]):
    """A mutable config. A known key that is missing reads as None; a misspelt one is an error, not a silent None.

    Mappings inside become DictDefault too; where their names are free (`special_tokens`, `optim_args`), any missing one
    reads as None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __missing__(self, key: str) -> None:
        self._require_known(key, KeyError)

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        self._require_known(key, AttributeError)
        return None

    def _require_known(self, key: str, error: type[Exception]) -> None:
        if key in KNOWN_KEYS:
            return
        close = nearest(key, KNOWN_KEYS)
        raise error(f"{key!r} is no config key{f'; did you mean {close!r}?' if close else ''}")

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _wrap(value, DictDefault if key in _LISTS_OF_SECTIONS else FreeDict))

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        del self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As `dict.update`, but a mapping that meets a mapping is merged into it."""
        for key, value in dict(*args, **kwargs).items():
            if isinstance(value, Mapping) and isinstance(self.get(key), DictDefault):
                self[key].update(value)
            else:
                self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As `dict.setdefault`."""
        if key not in self:
            self[key] = default
        return self[key]

    def __or__(self, other: Any) -> DictDefault:  # type: ignore[override]  # typeshed's is generic
        """Both together; where both have a key, the left one's value stays, as Axolotl's programs expect."""
        both = type(self)(copy.deepcopy(dict(other)))
        both.update(copy.deepcopy(self))
        return both

    def __ior__(self, other: Any) -> DictDefault:  # type: ignore[override]  # typeshed's is generic
        self.update(other)
        return self

    def copy(self) -> DictDefault:
        """A shallow copy."""
        return type(self)(self)

    def deepcopy(self) -> DictDefault:
        """A copy that shares nothing."""
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {key: _unwrap(value) for key, value in self.items()}


class FreeDict(DictDefault):
    """A mapping whose names are the user's own."""

    def _require_known(self, key: str, error: type[Exception]) -> None:
        if key.startswith("__"):
            raise error(key)  # what `copy` and `pickle` ask every object for


def _wrap(value: Any, kind: type[DictDefault]) -> Any:
    if isinstance(value, Mapping):
        return value if isinstance(value, DictDefault) else kind(value)
    if isinstance(value, (list, tuple)):
        return [_wrap(item, kind) for item in value]
    return value


def _unwrap(value: Any) -> Any:
    if isinstance(value, DictDefault):
        return value.to_dict()
    return [_unwrap(item) for item in value] if isinstance(value, list) else value


__all__ = ["DictDefault"]
