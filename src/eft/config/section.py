"""The base of every config section: frozen, no unknown keys, and it remembers which keys were read.

A key is declared once, with `key(...)`: type (the annotation), default, bounds, description, and when it has any
effect. Documentation, JSON schema and overrides come from that declaration. A function is annotated with the narrowest
section it reads.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError, PydanticUndefined


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
    notes = (("used_when", used_when), ("axolotl", axolotl))
    extra: JsonDict = {name: value for name, value in notes if value is not None}
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra or None, **bounds)
    return Field(default, description=description, json_schema_extra=extra or None, **bounds)


def type_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: `int | None` gives (int, NoneType); anything that is no union gives itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in type_members(part))
    if get_origin(annotation) is Annotated:
        return type_members(get_args(annotation)[0])
    return (annotation,)


class Section(BaseModel):
    """Part of the config. Attribute reads are recorded, so that a key nobody read can be reported (promise E8)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    _reads: set[str] = PrivateAttr(default_factory=set)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `lora_r: true` for 1."""
        assert info.field_name is not None
        members = type_members(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in members and (int in members or float in members):
            raise PydanticCustomError("bool_for_number", "true and false are not numbers")
        return value

    def __getattribute__(self, name: str) -> Any:
        if name[0] != "_" and name in type(self).__pydantic_fields__:
            private = object.__getattribute__(self, "__pydantic_private__")
            if private is not None:
                private["_reads"].add(name)
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        """Equal values; what was read so far does not count (pydantic would compare it)."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # holds lists and dicts

    def keys_read(self) -> frozenset[str]:
        """The keys read since the config was built (or since `forget_reads`)."""
        return frozenset(self._reads)

    def forget_reads(self) -> None:
        """Start the record anew, in nested sections too: validation and display read keys without using them."""
        self._reads.clear()
        for _, nested in self.nested_sections():
            nested.forget_reads()

    def nested_sections(self) -> list[tuple[str, Section]]:
        """The sections in this one's lists, each with its place: `datasets[0]`; does not count as reading them."""
        return [
            (f"{name}[{i}]", entry)
            for name, value in self.__dict__.items()
            if isinstance(value, list)
            for i, entry in enumerate(value)
            if isinstance(entry, Section)
        ]

    def changed_keys(self) -> dict[str, Any]:
        """The keys whose value differs from their default, with the value; does not count as reading them."""
        changed = {}
        for name, info in type(self).__pydantic_fields__.items():
            value = self.__dict__[name]
            if info.is_required() or value != info.get_default(call_default_factory=True):
                changed[name] = value
        return changed
