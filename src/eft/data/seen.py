"""What rows had in them that some keys of the config speak of: where nothing of it was there, the key had no say.

A store that was made with another value of such a key is the same store. Keys that are not treated here count by their
value (docs/preparation.md has the list).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eft.core.records import Message
from eft.data.formats.chat import REASONING, ROLES, THINKING_STARTS

MOST_NAMES = 256
"""Rows with more different names of fields are taken to have any."""
SPECIAL_TEXT, HISTORY, THOUGHTS, TAGS = "special text", "history", "reasoning", "generation tags"


@dataclass
class Seen:
    """What was met in rows; what was met in several blocks adds up, in any order."""

    columns: set[str] = field(default_factory=set)
    """Names of the rows' fields."""
    properties: set[str] = field(default_factory=set)
    """Names in the objects of lists among them: those of turns that have more than a role and one thing else."""
    any_name: bool = False
    """There may be others: too many to keep, or turns as JSON text."""
    roles: set[str] = field(default_factory=set)
    met: set[str] = field(default_factory=set)
    """SPECIAL_TEXT: a row has the text of a special token; HISTORY: a conversation was split or refused by the
    template; THOUGHTS: a turn has reasoning, apart or in its content; TAGS: the template has `{% generation %}`."""

    def look_at_row(self, row: Mapping[str, Any]) -> None:
        """Note the names in a row as it stands in its file."""
        self.columns.update(row)
        for value in row.values():
            if type(value) is list:
                for item in value:
                    if type(item) is dict and len(item) > 2:
                        self.properties.update(item)
            elif type(value) is str and value.lstrip()[:1] == "[":
                self.any_name = True

    def look_at_turns(self, messages: Sequence[Message]) -> None:
        """Note the turns of a conversation after its format."""
        for message in messages:
            content = message["content"]
            if len(message) == 2 and content[:1] != "<" and not content[:1].isspace():
                continue  # nearly all
            if "reasoning_content" in message or content.lstrip().startswith(THINKING_STARTS):
                self.met.add(THOUGHTS)

    def lose_track(self) -> None:
        """A row was left out that its format could not read: another key might have read it."""
        self.any_name = True
        self.roles |= ROLES.keys()
        self.met |= {SPECIAL_TEXT, HISTORY, THOUGHTS, TAGS}

    def add(self, other: Seen) -> None:
        """Note what another block had."""
        self.columns |= other.columns
        self.properties |= other.properties
        self.any_name |= other.any_name or len(self.columns | self.properties) > MOST_NAMES
        self.roles |= other.roles
        self.met |= other.met
        if self.any_name:
            self.columns, self.properties = set(), set()

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping; `from_json` is its inverse."""
        return {
            name: sorted(value) if isinstance(value, set) else value for name, value in sorted(self.__dict__.items())
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Seen:
        sets = {name: set(found) for name, found in value.items() if name != "any_name"}
        return cls(**sets, any_name=value["any_name"])

    # ---- what follows for a key ----

    def had_no_say(self, option: str, old: Any, new: Any) -> bool:
        """Whether rows like these give the same samples with either value of a key, as `cache.values_of` names it."""
        section, _, key = option.rpartition(".")
        if section != "datasets":
            return False
        if key in _WHERE_MET:
            return _WHERE_MET[key] not in self.met
        if key == "drop_system_message":  # what was dropped was not met
            return old is False and "system" not in self.roles
        if key == "roles_to_train":
            changed = set(old) ^ set(new)
            return changed <= ROLES.keys() - self.roles and TAGS not in self.met
        names = {name for name in (old, new) if isinstance(name, str)}
        if key == "field_thinking":
            return not self.any_name and THOUGHTS not in self.met and not self.properties & (names | set(REASONING))
        if key in _OF_TURNS:
            return not self.any_name and not self.properties & names
        return key in _OF_ROWS and not self.any_name and not self.columns & names


_WHERE_MET = {
    "special_tokens_in_content": SPECIAL_TEXT,
    "rewritten_history": HISTORY,
    "template_thinking_key": THOUGHTS,
    "split_thinking": THOUGHTS,
}
_OF_TURNS = ("message_field_training", "message_field_training_detail", "message_field_weight")
_OF_ROWS = ("field_system", "field_tools", "field_input")
"""Fields that a row may lack."""
