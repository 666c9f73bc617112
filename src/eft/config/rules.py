"""Rules that span keys: contradictions, and keys without effect. One small function each; tables at the end.

A rule that looks at a key which is itself wrong is not believed: `rule_problems` sees which keys a rule read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from eft.config.adapter_rules import ADAPTER_RULES
from eft.config.data_rules import DATA_RULES, DATASET_RULES
from eft.config.guard_rules import GUARD_RULES
from eft.config.memory_rules import MEMORY_RULES
from eft.config.multimodal_rules import MULTIMODAL_RULES
from eft.config.optim_rules import OPTIM_RULES
from eft.config.packing_rules import PACKING_RULES
from eft.config.parallel_rules import PARALLEL_RULES
from eft.config.precision_rules import PRECISION_RULES
from eft.config.root import Rule, TrainConfig
from eft.config.section import Section
from eft.config.source import KeyPath, dotted
from eft.config.streaming_rules import STREAMING_RULES

_ROW_RANGE = re.compile(r"\[\d*:\d*\]$")


def rule_problems(config: TrainConfig, ignore: Collection[KeyPath] = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every broken rule as (path of the key, text). Leaves no read marks.

    Args:
        config: the config to check.
        ignore: keys that are already known to be wrong; rules that read one of them are skipped.
    """
    for rule in RULES:
        config.forget_reads()
        found = rule(config)
        if found is not None and not any((name,) in ignore for name in config.keys_read()):
            yield (found[0],), found[1]
    yield from _without_effect(config, (), ignore)
    for name in ("datasets", "test_datasets"):
        for i, entry in enumerate(config.__dict__[name] or []):
            for dataset_rule in DATASET_RULES:
                entry.forget_reads()
                found = dataset_rule(entry)
                if found is not None and not any((name, i, key) in ignore for key in entry.keys_read()):
                    yield (name, i, found[0]), f"{dotted((name, i))}: {found[1]}"
            yield from _without_effect(entry, (name, i), ignore)
    config.forget_reads()


def _without_effect(section: Section, path: KeyPath, ignore: Collection[KeyPath]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that were changed although the key they depend on (`used_when`) is off."""
    for name in section.changed_keys():
        extra = type(section).model_fields[name].json_schema_extra
        switch = str(extra["used_when"]) if isinstance(extra, dict) and "used_when" in extra else None
        if switch is not None and (*path, switch) not in ignore and not section.__dict__[switch]:
            yield (*path, name), f"`{name}`: not used because `{switch}` is not set; set `{switch}`, or remove `{name}`"


# Data


def one_source_of_held_out_data(config: TrainConfig) -> tuple[str, str] | None:
    if config.val_set_size and config.test_datasets:
        return "val_set_size", "`val_set_size` and `test_datasets` both name held-out data; keep one of them"
    return None


def held_out_rows_are_whole(config: TrainConfig) -> tuple[str, str] | None:
    if config.val_set_size > 1 and config.val_set_size != int(config.val_set_size):
        return "val_set_size", f"`val_set_size: {config.val_set_size:g}`: a share is below 1, a number of rows is whole"
    return None


def shortest_below_longest(config: TrainConfig) -> tuple[str, str] | None:
    if config.min_sample_len > config.sequence_len:
        return (
            "min_sample_len",
            f"`min_sample_len: {config.min_sample_len}` is above `sequence_len: {config.sequence_len}`; no sample fits",
        )
    return None


# Batch and precision


def one_half_precision(config: TrainConfig) -> tuple[str, str] | None:
    if config.fp16 and config.bf16 is True:
        return "fp16", "`fp16` and `bf16` are both on; keep `bf16: true`, or on older GPUs `fp16: true`"
    return None


def global_batch_divides(config: TrainConfig) -> tuple[str, str] | None:
    if config.global_batch_size is None:
        return None
    per_device = config.micro_batch_size * (config.gradient_accumulation_steps or 1)
    if config.global_batch_size % per_device == 0:
        return None
    what = f"`micro_batch_size: {config.micro_batch_size}`"
    if config.gradient_accumulation_steps is not None:
        what += f" × `gradient_accumulation_steps: {config.gradient_accumulation_steps}`"
    nearby = max(per_device, round(config.global_batch_size / per_device) * per_device)
    return (
        "global_batch_size",
        f"`global_batch_size: {config.global_batch_size}` is no multiple of {what} = {per_device}; {nearby} is",
    )


# What is trained


def adapter_or_freezing(config: TrainConfig) -> tuple[str, str] | None:
    if config.adapter is None:
        return None
    for name, value in (
        ("unfrozen_parameters", config.unfrozen_parameters),
        ("train_top_layers", config.train_top_layers),
    ):
        if value is not None:
            return (
                name,
                f"`{name}` trains the model's own weights, `adapter` freezes them; keep one of them",
            )
    return None


def one_freezing_key(config: TrainConfig) -> tuple[str, str] | None:
    if config.unfrozen_parameters is not None and config.train_top_layers is not None:
        return (
            "train_top_layers",
            "`train_top_layers` and `unfrozen_parameters` both say what is trained; keep one of them",
        )
    return None


def adapter_needs_targets(config: TrainConfig) -> tuple[str, str] | None:
    if config.adapter in (None, "peft") or config.lora_target_linear or config.lora_target_modules:
        return None
    if config.lora_model_dir or config.lora_target_parameters:
        return None
    what = f"`adapter: {config.adapter}` needs its layers"
    return "adapter", f"{what}: set `lora_target_linear: true`, or list `lora_target_modules`"


def unfrozen_parameters_are_patterns(config: TrainConfig) -> tuple[str, str] | None:
    for pattern in config.unfrozen_parameters or []:
        if _ROW_RANGE.search(pattern):
            return (
                "unfrozen_parameters",
                f"`unfrozen_parameters: {pattern}`: ranges of rows are not offered; name the whole parameter",
            )
        try:
            re.compile(pattern)
        except re.error as error:
            return "unfrozen_parameters", f"`unfrozen_parameters: {pattern}` is no regular expression: {error}"
    return None


def special_tokens_are_roles(config: TrainConfig) -> tuple[str, str] | None:
    for role in config.special_tokens or {}:
        if not role.endswith("_token"):
            return (
                "special_tokens",
                f"`special_tokens`: `{role}` is no role; roles end in `_token`, such as `pad_token`",
            )
    return None


# Schedule


def one_warmup_key(config: TrainConfig) -> tuple[str, str] | None:
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        return "warmup_ratio", "`warmup_ratio` and `warmup_steps` both give the warm-up; keep one of them"
    return None


# Saving


def one_save_interval(config: TrainConfig) -> tuple[str, str] | None:
    if config.save_steps is not None and config.saves_per_epoch is not None:
        return "saves_per_epoch", "`saves_per_epoch` and `save_steps` both say when to save; keep one of them"
    return None


def save_interval_fits_strategy(config: TrainConfig) -> tuple[str, str] | None:
    return _interval_fits_strategy(
        "save", config.save_strategy, {"save_steps": config.save_steps, "saves_per_epoch": config.saves_per_epoch}
    )


def save_steps_are_whole(config: TrainConfig) -> tuple[str, str] | None:
    return _whole_steps("save_steps", config.save_steps)


def best_model_needs_checkpoints(config: TrainConfig) -> tuple[str, str] | None:
    if config.load_best_model_at_end and config.save_strategy == "no":
        return (
            "load_best_model_at_end",
            "`load_best_model_at_end` needs checkpoints to choose from; remove `save_strategy: no`",
        )
    return None


def best_average_needs_optimizer_state(config: TrainConfig) -> tuple[str, str] | None:
    averages = config.optimizer.startswith("schedule_free_") or config.weight_average is not None
    if config.load_best_model_at_end and config.save_only_model and averages:
        return (
            "save_only_model",
            f"`save_only_model`: `load_best_model_at_end` needs the state of {config.optimizer}; remove one of the two",
        )
    return None


# Evaluation


def one_eval_interval(config: TrainConfig) -> tuple[str, str] | None:
    if config.eval_steps is not None and config.evals_per_epoch is not None:
        return "evals_per_epoch", "`evals_per_epoch` and `eval_steps` both say when to evaluate; keep one of them"
    return None


def eval_interval_fits_strategy(config: TrainConfig) -> tuple[str, str] | None:
    return _interval_fits_strategy(
        "eval", config.eval_strategy, {"eval_steps": config.eval_steps, "evals_per_epoch": config.evals_per_epoch}
    )


def eval_steps_are_whole(config: TrainConfig) -> tuple[str, str] | None:
    return _whole_steps("eval_steps", config.eval_steps)


def evaluation_needs_data(config: TrainConfig) -> tuple[str, str] | None:
    if config.val_set_size or config.test_datasets:
        return None
    wanted = {
        "eval_strategy": config.eval_strategy not in (None, "no"),
        "eval_steps": config.eval_steps is not None,
        "evals_per_epoch": config.evals_per_epoch is not None,
        "eval_on_start": config.eval_on_start,
        "eval_batch_size": config.eval_batch_size is not None,
        "eval_sample_packing": config.eval_sample_packing is not None,
        "early_stopping_patience": config.early_stopping_patience is not None,
        "load_best_model_at_end": config.load_best_model_at_end,
        "generate_samples": config.generate_samples,
        "save_strategy": config.save_strategy == "best",
    }
    names = [name for name, is_on in wanted.items() if is_on]
    if not names:
        return None
    listed = ", ".join("`save_strategy: best`" if name == "save_strategy" else f"`{name}`" for name in names)
    return names[0], f"{listed}: needs held-out data; set `val_set_size` (such as 0.05) or `test_datasets`"


def evaluation_is_not_off(config: TrainConfig) -> tuple[str, str] | None:
    if config.eval_strategy != "no":
        return None
    wanted = {
        "eval_on_start": config.eval_on_start,
        "early_stopping_patience": config.early_stopping_patience is not None,
        "load_best_model_at_end": config.load_best_model_at_end,
        "save_strategy": config.save_strategy == "best",
    }
    for name, is_on in wanted.items():
        if is_on:
            return name, f"`{name}` needs evaluations; remove `eval_strategy: no`"
    return None


def a_loss_gets_better_downwards(config: TrainConfig) -> tuple[str, str] | None:
    if config.greater_is_better and config.metric_for_best_model.endswith("loss"):
        return (
            "greater_is_better",
            f"`greater_is_better: true` would keep the worst `{config.metric_for_best_model}`; remove it",
        )
    return None


def _interval_fits_strategy(
    kind: str, strategy: str | None, intervals: dict[str, float | None]
) -> tuple[str, str] | None:
    given = [name for name, value in intervals.items() if value is not None]
    if strategy == "steps" and not given:
        names = " or ".join(f"`{name}`" for name in intervals)
        return f"{kind}_strategy", f"`{kind}_strategy: steps` needs {names}"
    if strategy in ("no", "epoch", "best") and given:
        return (
            given[0],
            f"`{given[0]}`: not used because `{kind}_strategy` is `{strategy}`; write `steps`, or remove one",
        )
    return None


def _whole_steps(name: str, value: float | None) -> tuple[str, str] | None:
    if value is not None and value > 1 and value != int(value):
        return name, f"`{name}: {value:g}`: a share of all steps is below 1, a number of steps is whole"
    return None


RULES: tuple[Rule, ...] = (
    one_source_of_held_out_data,
    held_out_rows_are_whole,
    *DATA_RULES,
    shortest_below_longest,
    one_half_precision,
    global_batch_divides,
    adapter_or_freezing,
    one_freezing_key,
    adapter_needs_targets,
    unfrozen_parameters_are_patterns,
    special_tokens_are_roles,
    one_warmup_key,
    one_save_interval,
    save_interval_fits_strategy,
    save_steps_are_whole,
    best_model_needs_checkpoints,
    best_average_needs_optimizer_state,
    one_eval_interval,
    eval_interval_fits_strategy,
    eval_steps_are_whole,
    evaluation_needs_data,
    evaluation_is_not_off,
    a_loss_gets_better_downwards,
    *ADAPTER_RULES,
    *MEMORY_RULES,
    *OPTIM_RULES,
    *PRECISION_RULES,
    *GUARD_RULES,
    *PACKING_RULES,
    *PARALLEL_RULES,
    *STREAMING_RULES,
    *MULTIMODAL_RULES,
)
