"""Generated documentation: complete, and equal to what is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eft.config.data import DatasetConfig
from eft.config.problems import describe_type
from eft.config.reference import config_markdown, config_schema
from eft.config.root import TrainConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_page_is_the_generated_one() -> None:
    assert (DOCS / "config.md").read_text() == config_markdown(), "run `eft config docs`"


def test_every_key_has_a_row_and_a_description() -> None:
    page = config_markdown()
    for section in (TrainConfig, DatasetConfig):
        for name, info in section.model_fields.items():
            assert f"| `{name}` |" in page
            assert info.description, name


def test_schema_allows_null_for_the_default_and_aliases() -> None:
    schema = config_schema()
    properties: dict[str, Any] = schema["properties"]
    assert set(schema["required"]) == {"base_model", "datasets", "learning_rate"}
    assert properties["seed"]["type"] == ["integer", "null"]
    assert None in properties["optimizer"]["enum"]
    assert {"type": "null"} in properties["bf16"]["anyOf"]
    assert properties["learning_rate"]["type"] == "number"
    assert "scheduler" in properties
    assert schema["additionalProperties"] is False


def test_types_in_words() -> None:
    assert describe_type(int | None) == "a whole number"
    assert describe_type(list[str] | str | None) == "a list of texts or text"
    assert describe_type(dict[str, list[str]]) == "a mapping of names to lists of texts"
    assert describe_type(list[DatasetConfig]) == "a list of entries with `path`"
