"""E8: keys that nobody read are found."""

from __future__ import annotations

from typing import Any

from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.config.usage import effective_keys, keys_read, unused_keys, unused_message

MAPPING: dict[str, Any] = {
    "base_model": "tiny",
    "learning_rate": 1e-3,
    "datasets": [{"path": "a"}, {"path": "b", "type": "chat_template", "roles_to_train": ["user"]}],
    "weight_decay": 0.1,
}


def read_as_a_component(config: TrainConfig) -> None:
    _ = (config.base_model, config.learning_rate, config.weight_decay)
    for entry in config.datasets:
        _ = (entry.path, entry.type)


def test_a_fresh_config_has_read_nothing() -> None:
    assert sorted(unused_keys(config_from_mapping(MAPPING))) == [
        "base_model",
        "datasets",
        "learning_rate",
        "weight_decay",
    ]


def test_an_entrys_key_that_nobody_read_is_found() -> None:
    config = config_from_mapping(MAPPING)
    read_as_a_component(config)
    assert unused_keys(config) == ["datasets[1].roles_to_train"]
    _ = config.datasets[1].roles_to_train
    assert unused_keys(config) == []


def test_keys_at_their_default_need_no_reader() -> None:
    config = config_from_mapping(MAPPING | {"seed": 42, "weight_decay": 0.0})
    _ = (config.base_model, config.learning_rate)
    assert unused_keys(config, exempt=["datasets"]) == []


def test_the_promise() -> None:
    config = config_from_mapping(MAPPING)
    read_as_a_component(config)
    broken = effective_keys(config)
    assert (broken.promise, broken.status) == ("E8", "fail")
    assert "`datasets[1].roles_to_train`" in broken.detail
    assert effective_keys(config, read_before={"datasets[1].roles_to_train"}).status == "pass"


def test_keys_read_from_another_copy() -> None:
    config, copy = config_from_mapping(MAPPING), config_from_mapping(MAPPING)
    read_as_a_component(copy)
    assert effective_keys(config, read_before=keys_read(copy)).status == "fail"
    assert unused_keys(config, read_before=keys_read(copy)) == ["datasets[1].roles_to_train"]
    _ = copy.datasets[1].roles_to_train
    assert effective_keys(config, read_before=keys_read(copy)).status == "pass"


def test_display_and_comparison_are_not_reading() -> None:
    config = config_from_mapping(MAPPING)
    assert config == config_from_mapping(MAPPING)
    config.model_dump()
    assert config.keys_read() == frozenset()
    read_as_a_component(config)
    assert config == config_from_mapping(MAPPING)
    config.forget_reads()
    assert len(unused_keys(config)) == 4


def test_message_names_the_lines() -> None:
    message = unused_message(["seed", "tokens"], {"seed": "run.yaml:3"})
    assert "run.yaml:3: `seed`" in message
    assert "\n  `tokens`" in message
