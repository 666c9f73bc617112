"""The base of every config section: frozen, no unknown keys, and it remembers which keys were read.

A key is declared once, with `key(...)`: type (the annotation), default, bounds, description, and when it has any effect.
Documentation, JSON schema, `--help` and overrides come from that declaration. A function is annotated with the narrowest
section it reads.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from pydantic_core import PydanticUndefined


def key(
    default: Any = PydanticUndefined,
    description: str = "",
    *,
    used_when: str | None = None,
    axolotl: str | None = None,
    **bounds: Any,
) -> Any:
    """Declare a config key.

    Args:
        default: the value when the key is absent or null; none means that the key is required.
        description: one or two sentences for the generated reference.
        used_when: the name of another key; while that one is off (None, False, 0, empty) setting this one is an error.
        axolotl: how the meaning or default differs from Axolotl's, for the reference and the migration page.
        bounds: pydantic bounds (`gt`, `ge`, `lt`, `le`, `min_length`, `pattern`).
    """
    extra = {name: value for name, value in (("used_when", used_when), ("axolotl", axolotl)) if value is not None}
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra or None, **bounds)
    return Field(default, description=description, json_schema_extra=extra or None, **bounds)


class Section(BaseModel):
    """Part of the config. Attribute reads are recorded, so that a key nobody read can be reported (promise E8)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    _reads: set[str] = PrivateAttr(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        if name[0] != "_" and name in type(self).__pydantic_fields__:
            private = object.__getattribute__(self, "__pydantic_private__")
            if private is not None:
                private["_reads"].add(name)
        return super().__getattribute__(name)

    def keys_read(self) -> frozenset[str]:
        """The keys read since the config was built (or since `forget_reads`)."""
        return frozenset(self._reads)

    def forget_reads(self) -> None:
        """Start the record anew: validation and display read every key, which says nothing about the run."""
        self._reads.clear()

    def changed_keys(self) -> dict[str, Any]:
        """The keys whose value differs from their default, with the value; does not count as reading them."""
        changed = {}
        for name, info in type(self).__pydantic_fields__.items():
            value = self.__dict__[name]
            if info.is_required() or value != info.get_default(call_default_factory=True):
                changed[name] = value
        return changed
