"""Which rows, in which format, masked how."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key

FORMATS = Literal["chat_template", "alpaca", "completion", "input_output", "pretokenized"]
"""The built-in formats; `data.formats.FORMATS` has exactly these names. A user's own is `package.module:function`."""


class DatasetConfig(Section):
    """One entry of `datasets` or `test_datasets`."""

    path: str = key(description="File, folder or hub id.", min_length=1)
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = key(
        None, "File format; default: from the file's extension."
    )
    data_files: list[str] | str | None = key(None, "Files inside a folder or hub data set, relative to `path`.")
    name: str | None = key(None, "Configuration of a hub data set.")
    revision: str | None = key(None, "Branch, tag or commit of a hub data set.")
    split: str = key("train", "Split of a hub or saved data set.")
    type: str | None = key(
        None, "Format name, or `package.module:function`; null: rows are already tokenised (`input_ids`, `labels`)."
    )
    field_messages: str = key("messages", "Column that holds the list of turns (`chat_template`).")
    message_property_mappings: dict[str, str] = key(
        dict, "Our name of a turn's property to theirs, such as `{role: from, content: value}`."
    )
    roles: dict[str, list[str]] = key(dict, "Standard role to the names used in the rows: `{assistant: [gpt, model]}`.")
    field_tools: str = key("tools", "Column that holds the tool definitions (`chat_template`).")
    roles_to_train: list[str] = key(lambda: ["assistant"], "Roles whose turns are trained (`chat_template`).")
    train_on_eos: Literal["turn", "all", "last", "none"] = key(
        "turn", "Which end tokens are trained: of trained turns, of all turns, of the last turn, none."
    )
    chat_template: str | None = key(None, "As the global `chat_template`, for this data set alone.")
    field: str = key("text", "Column with the text (`completion`).")
    field_system: str = key("system", "Column with the system prompt (`alpaca`).")
    field_instruction: str = key("instruction", "Column with the instruction (`alpaca`).")
    field_input: str = key("input", "Column with the input (`alpaca`).")
    field_output: str = key("output", "Column with the answer (`alpaca`).")
    field_segments: str = key("segments", "Column with `{label, text}` pieces (`input_output`).")
    train_on_inputs: bool | None = key(None, "As the global `train_on_inputs`, for this data set alone.")


class DataConfig(Section):
    """The rows and what becomes of them before packing."""

    datasets: list[DatasetConfig] = key(description="Training data sets.", min_length=1)
    test_datasets: list[DatasetConfig] | None = key(None, "Held-out data sets; excludes `val_set_size`.")
    val_set_size: float = key(
        0.0,
        "Held-out share (below 1) or number of rows (1 and more), drawn at random by `seed`. Duplicates of held-out "
        "rows never stay in the training part.",
        ge=0.0,
        axolotl="Axolotl takes the tail of the shuffled rows and leaves duplicates on both sides.",
    )
    chat_template: str = key(
        "tokenizer_default",
        "`tokenizer_default`, `chatml`, `jinja` (with `chat_template_jinja`), or a Jinja file's path.",
    )
    chat_template_jinja: str | None = key(None, "Template text or file, with `chat_template: jinja`.")
    train_on_inputs: bool = key(False, "Train on prompts too.")
    sequence_len: int = key(512, "Capacity of a bin, and the longest sample, in tokens.", ge=2)
    excess_length_strategy: Literal["drop", "truncate", "raise"] = key(
        "drop", "What becomes of samples longer than `sequence_len`."
    )
    min_sample_len: int = key(2, "Shorter samples are dropped.", ge=2)
    malformed_rows: Literal["raise", "drop"] = key(
        "raise", "A row that does not fit its format stops the run, or is dropped and counted in the ledger."
    )
    dataset_prepared_path: str | None = key(
        None, "Folder of the prepared token stores; default: `$EFT_CACHE`, else `~/.cache/eft`."
    )
    shuffle_merged_datasets: bool = key(True, "Shuffle the samples of all data sets together, by `seed`.")
    dataset_exact_deduplication: bool = key(False, "Keep one of each group of samples with equal ids and labels.")
    seed: int = key(
        42,
        "Seed of split, mixture, plan, adapter and new-token initialisation, and dropout.",
        ge=0,
        axolotl="Axolotl leaves it unset unless the key is written, so that two runs differ.",
    )
