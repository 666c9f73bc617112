"""Text that leaves the machine with a model: without secrets, and without where files lay here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "***"

_SECRET_KEY = re.compile(
    r"(api_?key|secret|passw|credential|private_key|(auth|hf|access|hub|bearer)_?token)", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSW|CREDENTIAL)")
_SHORTEST_SECRET = 8
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
)
"""As Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS and Google write them, and JSON web tokens."""
_USER_IN_ADDRESS = re.compile(r"(://)[^/\s@]+@")
_QUERY_OF_ADDRESS = re.compile(r"(://[^\s?\"']+)\?[^\s\"'<>)]*")
_FILE_ADDRESS = re.compile(r"file://(?=/)", re.IGNORECASE)
_ABSOLUTE = re.compile(
    r"(?<![\w./:~-])(?:…|~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|()]+[/\\])+(?=([^\s/\\'\"<>|()]*))"
)
"""The folders of an absolute path with at least one of them; what follows them is a name."""
_WHOLE_PATH = re.compile(r"(?:/|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\)[^\n]*")


def redacted(text: str) -> str:
    """`text` with secrets replaced by `***` and the folders of absolute paths by `…/`.

    Secrets are what the environment holds under such names, what is written as well-known services write their tokens,
    and user, password and query of an address.
    """
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    text = _USER_IN_ADDRESS.sub(rf"\1{HIDDEN}@", _FILE_ADDRESS.sub("", text))
    text = _TOKENS.sub(HIDDEN, _QUERY_OF_ADDRESS.sub(r"\1", text))
    for place in (Path.cwd(), Path.home()):  # their names may have spaces
        if place != place.parent:
            text = text.replace(f"{place}/", "…/").replace(str(place), "…")
    return _ABSOLUTE.sub("…/", text)


def redact(value: Any) -> Any:
    """A JSON-able value with every text in it redacted; one that is a path as a whole keeps its name only."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if _SECRET_KEY.search(str(key)) and isinstance(item, str) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    if _WHOLE_PATH.fullmatch(value):
        value = "…/" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return redacted(value)
