"""Promise E8: every key that differs from its default was read by a component that ran, or is an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from eft.config.data import DataConfig
from eft.config.model import AdapterConfig, FreezingConfig, ModelConfig
from eft.config.parallel import RAY_KEYS
from eft.config.section import Section
from eft.core.records import PromiseResult

KEYS_OF_RUN = frozenset(
    {
        "resume_from_checkpoint",
        "auto_resume_from_checkpoints",
        "generate_samples",
        "num_generation_samples",
        "generation_max_new_tokens",
        "save_dtype",
        "verify_saves",
        "stall_timeout",
        *RAY_KEYS,
    }
)
"""Read by `eft.run` itself, some of them only after the training, or by what starts its processes."""

_SECTIONS_OF_CALLER = (ModelConfig, FreezingConfig, AdapterConfig, DataConfig)
KEYS_OF_CALLER = KEYS_OF_RUN.union(*(section.model_fields for section in _SECTIONS_OF_CALLER))
"""Whoever gives the builder a model and data of their own has loaded and prepared them, by these keys or otherwise."""


def keys_read(config: Section) -> frozenset[str]:
    """The keys read so far, those of nested entries as `datasets[0].path`."""
    nested = [f"{place}.{name}" for place, entry in config.nested_sections() for name in keys_read(entry)]
    return config.keys_read() | frozenset(nested)


def changed_keys(config: Section) -> list[str]:
    """The keys that differ from their defaults, those of nested entries as `datasets[0].path`."""
    nested = [f"{place}.{name}" for place, entry in config.nested_sections() for name in changed_keys(entry)]
    return [*config.changed_keys(), *nested]


def unused_keys(config: Section, exempt: Collection[str] = (), *, read_before: Collection[str] = ()) -> list[str]:
    """The changed keys that no component read.

    Args:
        config: the config that the components were given.
        exempt: keys that need no reader; naming a list (`datasets`) exempts its entries.
        read_before: keys read from another copy of the config, as `keys_read` gives them.
    """
    read = keys_read(config) | frozenset(read_before)
    return [
        name
        for name in changed_keys(config)
        if name not in read and name not in exempt and not _list_settles(name, read, exempt)
    ]


def _list_settles(name: str, read: Collection[str], exempt: Collection[str]) -> bool:
    """Whether an entry's key need not be reported beside its list: the list is exempt, or is itself unread."""
    if "[" not in name:
        return False
    parent = name.partition("[")[0]
    return parent in exempt or parent not in read


def unused_message(unused: Collection[str], origins: Mapping[str, str] | None = None) -> str:
    """What to tell the user about keys that had no effect; `origins` (key to `run.yaml:12`) adds the lines."""
    lines = [f"{origins[name]}: `{name}`" if origins and name in origins else f"`{name}`" for name in unused]
    head = "these keys are set, but nothing in this run uses them (E8); remove them, or set the key they depend on"
    return f"{head}: {lines[0]}" if len(lines) == 1 else head + ":\n" + "\n".join(f"  {line}" for line in lines)


def effective_keys(
    config: Section, *, read_before: Collection[str] = (), exempt: Collection[str] = ()
) -> PromiseResult:
    """Promise E8 for one run, asked when everything has been set up.

    Args:
        config: the config that the components were given.
        read_before: keys read from another copy of the config, such as those of data prepared earlier.
        exempt: keys that somebody else heeds; naming a list (`datasets`) exempts its entries.
    """
    unused = unused_keys(config, exempt, read_before=read_before)
    changed = changed_keys(config)
    numbers = {"changed": float(len(changed)), "unused": float(len(unused))}
    if unused:
        return PromiseResult("E8", "effective keys", "fail", unused_message(unused), numbers)
    left = len(unused_keys(config, read_before=read_before))
    detail = f"all {len(changed) - left} keys that differ from their defaults were read"
    if left:
        detail += f"; {left} more are read by what is around the trainer"
    return PromiseResult("E8", "effective keys", "pass", detail, numbers)
