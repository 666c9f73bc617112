"""Options that a table row accepts beyond the config keys, and their check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eft.core.errors import ConfigError, nearest

OptionKind = Literal["number", "integer", "switch", "pair", "choice"]

_EXPECTED: dict[OptionKind, str] = {
    "number": "a number",
    "integer": "a whole number",
    "switch": "true or false",
    "pair": "a list of two numbers",
    "choice": "one of",
}


@dataclass(frozen=True)
class Option:
    """One option: what it must be and what it does."""

    kind: OptionKind
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    use_instead: str | None = None
    """The config key that sets this; the option is then refused with a pointer to it."""


def check_options(
    key: str, given: Mapping[str, Any] | None, accepted: Mapping[str, Option], owner: str
) -> dict[str, Any]:
    """The options in `given`, each checked against `accepted` and converted to the type its owner expects.

    Args:
        key: the config key they were given under, for messages (`optim_args`).
        owner: whose options they are, for messages (`optimizer sgd`).

    Raises:
        ConfigError: an option that the owner does not have, that a config key sets, or of the wrong type or range.
    """
    return {name: _checked(f"{key}.{name}", name, value, accepted, owner) for name, value in (given or {}).items()}


def _checked(path: str, name: str, value: Any, accepted: Mapping[str, Option], owner: str) -> Any:
    usable = sorted(known for known, option in accepted.items() if option.use_instead is None)
    if name not in accepted:
        close = nearest(name, usable)
        hint = f" Did you mean {close!r}?" if close else ""
        allowed = f"It accepts: {', '.join(usable)}." if usable else "It accepts no options."
        raise ConfigError(f"{path}: {owner} has no such option.{hint} {allowed}")
    option = accepted[name]
    if option.use_instead is not None:
        raise ConfigError(f"{path}: set `{option.use_instead}` instead; it decides this option of {owner}.")
    if not _fits(option, value):
        expected = _EXPECTED[option.kind] + (f" {', '.join(option.choices)}" if option.choices else "")
        quoted = (
            " Write numbers and true/false without quotes." if isinstance(value, str) and not option.choices else ""
        )
        raise ConfigError(f"{path}: expected {expected}, got {value!r}.{quoted}")
    if option.minimum is not None and value < option.minimum:
        raise ConfigError(f"{path}: must be at least {option.minimum:g}, got {value!r}.")
    if option.maximum is not None and value > option.maximum:
        raise ConfigError(f"{path}: must be at most {option.maximum:g}, got {value!r}.")
    if option.kind == "pair":
        return tuple(float(item) for item in value)
    return float(value) if option.kind == "number" else value


def _fits(option: Option, value: Any) -> bool:
    match option.kind:
        case "switch":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return _is_number(value)
        case "pair":
            return isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(item) for item in value)
        case "choice":
            return value in option.choices


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
