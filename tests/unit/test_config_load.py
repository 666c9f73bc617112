"""YAML and mappings to a checked config: every mistake is named with its place."""

from __future__ import annotations

from collections import UserDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eft.config.axolotl_keys import AXOLOTL_DATASET_KEYS, AXOLOTL_KEYS, COMPUTED, ELSEWHERE, RENAMED
from eft.config.data import DatasetConfig
from eft.config.dump import dump_config, show_config
from eft.config.load import LoadedConfig, config_from_mapping, load_config, load_mapping
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError

MINIMAL = "base_model: tiny\nlearning_rate: 2e-5\ndatasets:\n  - path: rows.jsonl\n"
MAPPING: dict[str, Any] = {"base_model": "tiny", "learning_rate": 2e-5, "datasets": [{"path": "rows.jsonl"}]}


def load(folder: Path, text: str, *overrides: str, allow_unsupported: bool = False) -> LoadedConfig:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, allow_unsupported=allow_unsupported)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


# Values


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("weight_decay: 1e-2", "weight_decay", 0.01),
        ("weight_decay: 1E2", "weight_decay", 100.0),
        ("weight_decay: .5", "weight_decay", 0.5),
        ('weight_decay: "1e-2"', "weight_decay", 0.01),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 1_000", "max_steps", 1000),
        ("max_steps: 0x10", "max_steps", 16),
        ("max_steps: 010", "max_steps", 10),
        ("max_steps: !!int '12'", "max_steps", 12),
        ("max_steps:", "max_steps", None),
        ("sample_packing: yes", "sample_packing", True),
        ("sample_packing: Off", "sample_packing", False),
        ("sample_packing: true", "sample_packing", True),
        ("bf16: auto", "bf16", "auto"),
        ("bf16: no", "bf16", False),
        ("resume_from_checkpoint: yes", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: out/checkpoint-3", "resume_from_checkpoint", "out/checkpoint-3"),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: false", "save_strategy", "no"),
        ("revision_of_model: 123e4", "revision_of_model", "123e4"),
        ("revision_of_model: 2026-01-01", "revision_of_model", "2026-01-01"),
        ("revision_of_model: 'no'", "revision_of_model", "no"),
        ("revision_of_model: !!str 12", "revision_of_model", "12"),
        ("tokens: [1, <x>]", "tokens", ["1", "<x>"]),
        ("special_tokens: {pad_token: 0}", "special_tokens", {"pad_token": "0"}),
        ("optim_args: {a: 1, b: 1e-3, c: yes, d: null}", "optim_args", {"a": 1, "b": 1e-3, "c": "yes", "d": None}),
        ("seed: null", "seed", 42),
        ("scheduler: linear", "lr_scheduler", "linear"),
        ("batch_size: 8", "global_batch_size", 8),
    ],
)
def test_values_are_read_as_people_mean_them(tmp_path: Path, line: str, key: str, value: object) -> None:
    config = load(tmp_path, MINIMAL + line + "\n").config
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = (
        "x-chat: &chat\n  type: chat_template\n  field_messages: turns\nbase_model: tiny\nlearning_rate: 1e-3\n"
        "datasets:\n  - {<<: *chat, path: a}\n  - <<: [*chat, {split: test}]\n    path: b\n    field_messages: own\n"
    )
    loaded = load(tmp_path, text)
    first, second = loaded.config.datasets
    assert (first.type, first.field_messages, first.split) == ("chat_template", "turns", "train")
    assert (second.type, second.field_messages, second.split) == ("chat_template", "own", "test")
    assert loaded.origins["datasets[0].field_messages"].endswith("run.yaml:3")
    assert loaded.origins["datasets[1].field_messages"].endswith("run.yaml:10")


# Mistakes in the file itself


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml: the file is empty; it needs at least `base_model`, `datasets`, `learning_rate`"),
        ("# nothing\n", "run.yaml: the file is empty"),
        ("- a\n- b\n", "run.yaml:1: expected `key: value` lines, found a list"),
        ("hello\n", "run.yaml:1: expected `key: value` lines, found `hello`"),
        ("a: 1\n\tb: 2\n", "run.yaml:2: indented with a tab"),
        (MINIMAL + "tokens: [a\n", "run.yaml:6: not valid YAML"),
        (MINIMAL + "---\nseed: 1\n", "run.yaml:5: a second document starts here"),
        (MINIMAL + "seed: *nope\n", "run.yaml:5: not valid YAML"),
        (MINIMAL + "seed: !!python/name:os.system\n", "run.yaml:5: `seed`: the tag"),
        (MINIMAL + "? [a, b]\n: 1\n", "run.yaml:5: a key must be one word"),
        (MINIMAL + "optim_args: &a {x: *a}\n", "run.yaml:5: `optim_args.x` contains itself"),
        (MINIMAL + "optim_args: {<<: 3}\n", "run.yaml:5: `<<` merges mappings"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(tmp_path, text).startswith(expected)


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "    split: a\n    split: b\nlearning_rate: 1e-4\n")
    assert "run.yaml:6: `datasets[0].split` is already set in line 5" in message
    assert "run.yaml:7: `learning_rate` is already set in line 2" in message


def test_missing_unreadable_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"rnu\.yaml: no such file; did you mean .*run\.yaml\?"):
        load_config(tmp_path / "rnu.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; expected a YAML file, such as .*run\.yaml"):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: not UTF-8 text \(byte 0xff\)"):
        load_config(tmp_path / "run.yaml")


# Mistakes in keys and values


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sample_pakcing: true", "`sample_pakcing: true`: unknown key; did you mean `sample_packing`?"),
        ("num_train_epochs: 3", "unknown key; did you mean `num_epochs`?"),
        ("flash_atention: true", "unknown key; Axolotl has `flash_attention`, eft has not: remove it"),
        ("zzz: null", "`zzz: null`: unknown key"),
        ("field_messages: x", "unknown key here; it belongs in an entry of `datasets`"),
        ("lora_r: 0", "`lora_r: 0`: expected a whole number ≥ 1"),
        ("lora_r: true", "`lora_r: true`: expected a whole number ≥ 1"),
        ("micro_batch_size: 2.5", "expected a whole number ≥ 1"),
        ("warmup_ratio: 5", "expected a number ≥ 0 and < 1"),
        ("weight_decay: .inf", "expected a number ≥ 0"),
        ("lr_scheduler: cosin", "did you mean `cosine`?"),
        ("optimizer: adamw_hf", "use `adamw_torch_fused`"),
        ("optimizer: galore_adamw", "`adamw_8bit` and `adamw_torch_4bit` keep as little, and resume exactly"),
        ("lr_scheduler: greedy", "it follows the losses"),
        ("lr_groups: [{name: q, modules: [q_proj]}]", "`lr_groups[0].lr` is missing"),
        ("adapter: dora", "use `adapter: lora` and `peft_use_dora: true`"),
        ("attn_implementation: flex_attention", "leave the key out: `eft` runs"),
        ("chat_template: nemotron_h", "use `tokenizer_default`"),
        ("chat_template: chatlm", "did you mean `chatml`?"),
        ("tf32: auto", "expected true or false; use `true`, or leave the key out"),
        ("save_dtype: bf16", "expected `float32`, `bfloat16` or `float16`"),
        ("revision_of_model: true", "expected text; put it in quotes if the word is meant"),
        ("tokens: x", "`tokens: x`: expected a list of texts"),
        ("special_tokens: {additional_special_tokens: [a]}", "list `additional_special_tokens` under `tokens`"),
        ("gptq: true", "Axolotl has this key, eft has not: this quantisation is not offered"),
        ("comet_api_key: hunter2", "`comet_api_key: ***`"),
        ("mlflow_uri: https://me:secret@host", "https://***@host"),
    ],
)
def test_wrong_lines(tmp_path: Path, line: str, expected: str) -> None:
    message = error_of(tmp_path, MINIMAL + line + "\n")
    assert message.startswith("run.yaml:5: ")
    assert expected in message
    assert "hunter2" not in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("  - {path: a, sequence_len: 3}", "it belongs at the top level"),
        ("  - {path: a, field_instrction: b}", "`datasets[0].field_instrction: b`: unknown key; did you mean"),
        ("  - {path: a, shards: 4}", "`datasets[0].shards: 4`: Axolotl has this key, eft has not"),
        ("  - {type: alpaca}", "`datasets[0].path` is missing: File, folder or hub id."),
        ("  - {path: a, type: {field_ouput: b}}", "`type`: unknown key `field_ouput`; did you mean `field_output`?"),
        ("  - {path: a, type: my.rows.load}", "for a function of your own write `my.rows:load`"),
        ("  - {path: a, type: sharegtp}", "datasets[0]: `type: sharegtp`: expected a format of docs/data.md"),
        ("  - {path: a, type: alpaca:chatt}", "did you mean `alpaca:chat`?"),
        ("  - {path: a, type: llama2_chat}", "use `type: sharegpt` with `chat_template: llama2`"),
        ("  - {path: a, type: completion, field_messages: b}", "only used with `type` `chat_template`, not with"),
        ("  - rows.jsonl", "expected a list of entries with `path` (not empty); write `- path: rows.jsonl`"),
        ("  - {path: a, train_on_eos: maybe}", "expected `turn`, `all`, `last` or `none`"),
        ("  - {path: a, roles: {assistant: gpt}}", "expected a mapping of names to lists of texts"),
    ],
)
def test_wrong_data_set_entries(tmp_path: Path, entry: str, expected: str) -> None:
    message = error_of(tmp_path, f"base_model: m\nlearning_rate: 1\ndatasets:\n{entry}\n")
    assert message.startswith(("run.yaml:4: ", "run.yaml:3: "))
    assert expected in message


def test_everything_wrong_is_said_at_once_and_nothing_twice(tmp_path: Path) -> None:
    message = error_of(
        tmp_path,
        "lerning_rate: 2e-5\nadapter: dora\nlora_r: 4\nwarmup_steps: 3\nwarmup_ratio: 0.1\nflash_attention: true\n"
        "datasets:\n  - {path: a, type: alpca}\n  - {type: alpaca}\n",
        "seed=-1",
        "foo",
    )
    lines = [line.strip() for line in message.splitlines()]
    assert lines[0] == "run.yaml: 9 problems"
    assert [line.partition(": ")[0] for line in lines[1:-1]] == [
        "run.yaml",  # base_model is missing; learning_rate is not said to be, its typo is
        "run.yaml:1",
        "run.yaml:2",  # `lora_r` is not called useless because of it
        "run.yaml:5",
        "run.yaml:6",
        "run.yaml:8",
        "run.yaml:9",
        "command line",
        "command line",
    ]
    assert lines[-1] == "keys that Axolotl has and eft has not are ignored with --allow-unsupported"


# Axolotl's keys


def test_axolotl_keys_that_ask_for_nothing_are_accepted(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "    shards:\nflash_attention:\ngptq: false\nsample_packing_group_size: 100000\n")
    assert loaded.accepted == ["flash_attention", "gptq", "sample_packing_group_size", "datasets[0].shards"]
    assert len(loaded.notes()) == 1


def test_allow_unsupported(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "deepcompile: true\n", allow_unsupported=True)
    assert loaded.unsupported == ["deepcompile"]
    assert "deepcompile" in loaded.notes()[0]


def test_tables_do_not_shadow_our_own_keys() -> None:
    own, own_dataset = set(TrainConfig.model_fields), set(DatasetConfig.model_fields)
    assert not own & {*AXOLOTL_KEYS, *COMPUTED, *RENAMED, *ELSEWHERE}
    assert not own_dataset & set(AXOLOTL_DATASET_KEYS)
    assert {*RENAMED.values(), *ELSEWHERE.values()} <= own


def test_alias_and_name_together(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL + "scheduler: linear\nlr_scheduler: cosine\n")
    assert "run.yaml:5: `scheduler` is another name of `lr_scheduler`, which is set too" in message


# Overrides and origins


def test_overrides_and_origins(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, MINIMAL + "seed: 1\n", "seed=7", "datasets.0.path=b", "datasets[0].split=x", "optim_args.a=1e-3",
        "scheduler=linear", "revision_of_model=0123",
    )  # fmt: skip
    config, origins = loaded.config, loaded.origins
    assert (config.seed, config.datasets[0].path, config.datasets[0].split) == (7, "b", "x")
    assert (config.optim_args, config.lr_scheduler, config.revision_of_model) == ({"a": 1e-3}, "linear", "0123")
    assert origins["seed"] == origins["datasets[0].path"] == origins["lr_scheduler"] == "command line"
    assert origins["learning_rate"].endswith("run.yaml:2")
    assert origins["max_steps"] == origins["datasets[0].type"] == "default"
    assert set(origins) >= set(TrainConfig.model_fields)


def test_an_override_of_an_alias_or_of_what_an_alias_set(tmp_path: Path) -> None:
    text = MINIMAL + "scheduler: linear\n"
    assert load(tmp_path, text, "lr_scheduler=rex").config.lr_scheduler == "rex"
    assert load(tmp_path, text, "scheduler=rex").config.lr_scheduler == "rex"


def test_an_override_of_a_whole_list_leaves_no_old_lines(tmp_path: Path) -> None:
    message = error_of(tmp_path, MINIMAL, "datasets=[{type: alpaca}]")
    assert message.startswith("command line: `datasets[0].path` is missing")


def test_an_override_back_to_null_is_the_default(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "seed: 1\n", "seed=null")
    assert loaded.config.seed == 42
    assert loaded.origins["seed"] == "default"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sede=3", "command line: `sede: 3`: unknown key; did you mean `seed`?"),
        ("seed", "command line: `seed`: expected `key=value`"),
        ("=3", "command line: `=3`: expected `key=value`"),
        ("seed=x", "command line: `seed: x`: expected a whole number ≥ 0"),
        ("datasets.3.path=x", "`datasets` has 1 entries, numbered from 0; there is no `3`"),
        ("base_model.x=1", "`base_model` is no mapping"),
        ("tokens=[a", "command line: `tokens`: `[a` is not valid YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in error_of(tmp_path, MINIMAL, override)


# Mappings


def test_mapping_of_another_class_with_nulls() -> None:
    entry = UserDict({"path": Path("rows.jsonl"), "type": None})
    loaded = load_mapping(
        UserDict(MAPPING | {"datasets": [entry], "seed": None, "axolotl_config_path": "x", "rl": None})
    )
    assert loaded.config == config_from_mapping(MAPPING)
    assert loaded.origins["base_model"] == "<dict>"
    assert loaded.accepted == ["axolotl_config_path"]


def test_mapping_mistakes_name_the_source() -> None:
    with pytest.raises(ConfigError, match=r"cfg: `sede: 3`: unknown key; did you mean `seed`\?"):
        config_from_mapping(MAPPING | {"sede": 3}, "cfg")


def test_the_callers_mapping_is_left_alone() -> None:
    mapping = MAPPING | {"scheduler": "linear", "flash_attention": None}
    before = dict(mapping)
    config_from_mapping(mapping)
    assert mapping == before


# The effective config


def test_dump_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "optim_args: {a: 1e-9, b: [x, 'no']}\ntokens: ['1', 'a: b', '']\n").config
    assert load(tmp_path, dump_config(config)).config == config


@pytest.mark.parametrize(
    "word", ["true", "no", "On", "null", "~", "1e5", "0x10", "2026-01-01", ".nan", "=", "<<", "- x"]
)
def test_dump_keeps_words_that_yaml_would_take_for_something_else(tmp_path: Path, word: str) -> None:
    config = TrainConfig(
        **MAPPING | {"base_model": word, "resume_from_checkpoint": word, "optim_args": {word: word}, "tokens": [word]}
    )
    assert load(tmp_path, dump_config(config)).config == config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    number=st.floats(min_value=1e-300, allow_infinity=False),
    tokens=st.lists(st.text("#:'\"-[]{}&*!|>%@` \n\t0123e+yesno~,?\u2028\x85\x7f"), max_size=4),
)
def test_dump_keeps_any_text_and_number(tmp_path: Path, text: str, number: float, tokens: list[str]) -> None:
    args = {"x": text, text: number}
    config = TrainConfig(
        **MAPPING | {"base_model": text, "learning_rate": number, "tokens": tokens, "optim_args": args}
    )
    assert load(tmp_path, dump_config(config).replace("\r", "")).config == config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(st.text("ab:- \n\t[]{}&*<!'\"#,?|>0123e.", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_config_or_a_config_error(tmp_path: Path, text: str) -> None:
    for whole in (text, MINIMAL + text):
        with suppress(ConfigError):
            load(tmp_path, whole)


def test_credentials_are_not_dumped(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "use_mlflow: true\nmlflow_tracking_uri: https://me:secret@host/x\n").config
    assert "https://***@host/x" in dump_config(config)
    assert "secret" not in dump_config(config)


def test_show_lists_origins_and_only_what_is_set(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL, "seed=3")
    lines = {line.key: origin for line, origin in show_config(loaded, only_set=True) if line.key}
    assert list(lines) == ["base_model", "datasets", "datasets[0].path", "seed", "learning_rate"]
    assert lines["seed"] == "command line"
    assert {line.key for line, _ in show_config(loaded)} >= set(TrainConfig.model_fields)
    assert {origin for _, origin in show_config(LoadedConfig(loaded.config, {}))} == {""}


def test_the_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("base_model: m\nlearning_rate: 1\ndatasets: [{path: a}]\noutput_dir: ~/out\n")
    config = load_config(tmp_path / "run.yaml", ["resume_from_checkpoint=~/out/checkpoint-1"]).config
    assert config.output_dir == str(tmp_path / "out")
    assert config.resume_from_checkpoint == str(tmp_path / "out" / "checkpoint-1")
