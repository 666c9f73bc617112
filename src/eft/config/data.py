"""Which rows, in which format, masked how."""

from __future__ import annotations

from typing import Any, Literal

from eft.config.section import Section, key

EndTokens = Literal["turn", "all", "last", "none"]
GateName = Literal[
    "untrained_rows",
    "bos",
    "end_tokens",
    "cut_answers",
    "fully_trained",
    "other_roles",
    "headers",
    "empty_reasoning",
    "duplicates",
    "leaks",
    "template",
]
"""What the prepared data are checked for; `data.gates.GATES` has exactly these names."""


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
    type: dict[str, str | None] | str | None = key(
        None,
        "Format name, `package.module:function`, or a mapping with a prompt of your own (`field_…`, `format`, "
        "`no_input_format`, `system_prompt`, `system_format`); null: rows are already tokenised (`input_ids`, "
        "`labels`).",
    )
    field_messages: str = key("messages", "Column that holds the list of turns.")
    message_property_mappings: dict[str, str] = key(
        dict, "Our name of a turn's property to theirs, such as `{role: from, content: value}`."
    )
    roles: dict[str, list[str]] = key(dict, "Standard role to the names used in the rows: `{assistant: [gpt, model]}`.")
    field_tools: str = key("tools", "Column that holds the tool definitions.")
    field_thinking: str = key("reasoning_content", "Property of a turn that holds its reasoning.")
    template_thinking_key: str = key("reasoning_content", "Name under which the chat template reads the reasoning.")
    split_thinking: bool = key(
        False,
        "Move reasoning that stands in the content between `<think>` tags (or `<reasoning>`, `<|begin_of_thought|>`) "
        "to `template_thinking_key`.",
    )
    drop_system_message: bool = key(False, "Leave out a first turn of the role system.")
    message_field_training: str | None = key(
        None, "Property of a turn (true or false) that comes before `roles_to_train`."
    )
    message_field_training_detail: str | None = key(
        None,
        "Property of a turn that lists parts of its content, `{begin_offset, end_offset, train, weight}`, in "
        "characters, both ends included; of such a turn only the parts with `train: true` and its end are trained.",
    )
    message_field_weight: str = key(
        "weight", "Property of a turn that holds the weight (0 or more) of its tokens in the loss."
    )
    roles_to_train: list[str] = key(
        lambda: ["assistant"],
        "Roles whose turns are trained.",
        axolotl="Axolotl's null means `turns_to_train: last`; null is the default here as everywhere.",
    )
    turns_to_train: Literal["all", "last"] = key("all", "Of the turns to train, all or only the last one.")
    train_on_eos: EndTokens = key(
        "turn", "Which end tokens are trained: of trained turns, of all turns, of the last turn, none."
    )
    train_on_eot: EndTokens | None = key(
        None, "As `train_on_eos`, for end tokens other than the tokenizer's EOS; default: as `train_on_eos`."
    )
    chat_template: str | None = key(None, "As the global `chat_template`, for this data set alone.")
    chat_template_jinja: str | None = key(None, "As the global `chat_template_jinja`, for this data set alone.")
    rewritten_history: Literal["split", "raise"] = key(
        "split",
        "Where the template shows earlier turns otherwise than when they were written (Qwen3 leaves out their "
        "reasoning): make one sample per such turn, each with the context that inference shows, or refuse the row.",
    )
    special_tokens_in_content: Literal["error", "escape", "keep"] = key(
        "error",
        "A turn whose text contains the text of a special token: refuse the row, tokenise it as plain text, or let it "
        "become the special token as servers do.",
    )
    field: str = key("text", "Column with the text (`completion`).")
    field_system: str = key("system", "Column with the system prompt.")
    field_instruction: str = key("instruction", "Column with the instruction.")
    field_input: str = key("input", "Column with the input.")
    field_output: str = key("output", "Column with the answer.")
    field_segments: str = key("segments", "Column with `{label, text}` pieces (`input_output`).")
    train_on_inputs: bool | None = key(None, "As the global `train_on_inputs`, for this data set alone.")
    generation_tags: Literal["follow", "ignore"] = key(
        "follow",
        "Where the template marks what the assistant writes with `{% generation %}`: train exactly that, or go by the "
        "turns as with any other template.",
    )
    weight: float = key(
        1.0,
        "How often each sample of this data set comes in an epoch: 2 twice, 0.5 a random half of them once.",
        gt=0.0,
    )
    token_share: float | None = key(
        None,
        "Share of the epoch's tokens that come from this data set, by repeating or leaving out samples; data sets "
        "without it share the rest as their `weight` has it.",
        gt=0.0,
        le=1.0,
    )
    max_rows: int | None = key(None, "At most this many rows are trained, chosen at random by `seed`.", ge=1)
    max_tokens: int | None = key(None, "At most this many tokens are trained, whole rows chosen by `seed`.", ge=1)


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
        "`tokenizer_default`, the name of a built-in template (`docs/templates.md`), "
        "`tokenizer_default_fallback_` and such a name, `jinja` (with `chat_template_jinja`), or a Jinja file's path.",
    )
    chat_template_jinja: str | None = key(None, "Template text or file, with `chat_template: jinja`.")
    chat_template_kwargs: dict[str, Any] = key(
        dict,
        "Variables of the chat template, such as `{enable_thinking: false}`; they are saved with it as its defaults.",
    )
    chat_template_date: str | None = key(
        None,
        "The day (`2025-01-31`) for templates that write today's date; it is saved with the template.",
        pattern=r"^\d{4}-\d{2}-\d{2}$",
    )
    eot_tokens: list[str] | None = key(
        None,
        "The tokens that end turns, beside EOS; default: the first special token after a turn's text.",
    )
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
    dataset_processes: int | None = key(
        None, "Processes that prepare data; default: one per core up to six, and one in all for a small data set.", ge=1
    )
    shuffle_merged_datasets: bool = key(True, "Shuffle the samples of all data sets together, by `seed`.")
    dataset_exact_deduplication: bool = key(False, "Keep one of each group of samples with equal ids and labels.")
    epoch_tokens: int | None = key(
        None, "Tokens of an epoch with `token_share`; default: as many as the data sets hold together.", ge=1
    )
    data_gates: Literal["error", "warn", "off"] = key(
        "error",
        "Check the prepared data (docs/data-gates.md) before anything is trained: stop over a limit, warn, or do not "
        "look.",
    )
    data_gate_limits: dict[GateName, float] = key(
        dict, "Limits other than the defaults, as shares from 0 to 1: `{duplicates: 0.5}`."
    )
    data_gate_conversations: int = key(
        256,
        "Conversations of each data set whose prompts are compared with `apply_chat_template`; `eft verify` compares "
        "all.",
        ge=1,
    )
    seed: int = key(
        42,
        "Seed of split, mixture, plan, adapter and new-token initialisation, and dropout.",
        ge=0,
        axolotl="Axolotl leaves it unset unless the key is written, so that two runs differ.",
    )
