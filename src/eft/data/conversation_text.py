"""Conversations as the store keeps them: JSON, or for turns of nothing but role and text those with separators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from eft.core.records import Message

_TURN, _TEXT = "\x1e", "\x1f"
"""ASCII's record and unit separator: what starts with one is not JSON. Several times faster than JSON."""
_ENCODER = json.JSONEncoder(check_circular=False, default=str)


def conversation_bytes(messages: Sequence[Message], tools: Any) -> bytes:
    """UTF-8 that `read_conversation` takes."""
    parts: list[str] = []
    for message in messages if not tools else ():
        if len(message) != 2:  # role and content are always there
            break
        parts += (_TURN, message["role"], _TEXT, message["content"])
    if len(parts) == 4 * len(messages):
        text = "".join(parts)
        if text.count(_TEXT) == text.count(_TURN) == len(messages):
            try:
                return text.encode()
            except UnicodeEncodeError:  # half of a character, which JSON can say
                pass
    return _ENCODER.encode({"messages": messages, "tools": tools}).encode()


def read_conversation(text: str) -> dict[str, Any]:
    """`{"messages": [...], "tools": [...] or None}`."""
    if not text.startswith(_TURN):
        return cast("dict[str, Any]", json.loads(text))
    turns = [turn.split(_TEXT) for turn in text[1:].split(_TURN)]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "tools": None}
