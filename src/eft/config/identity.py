"""Which keys make a run the run it is: a resumed run must agree in them, and in nothing else."""

from __future__ import annotations

from typing import Any

from eft.config.logging import LoggingConfig
from eft.config.parallel import RAY_KEYS
from eft.config.root import TrainConfig
from eft.core.hashing import hash_json

FREE_KEYS = frozenset(LoggingConfig.model_fields) | {
    # Where things are and how they are run, not what is computed.
    "output_dir",
    "dataset_prepared_path",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "gradient_checkpointing_every",
    "selective_checkpointing",
    "activation_offloading",
    "optimizer_in_backward",
    "torch_empty_cache_steps",
    "preflight",
    "deterministic",
    "ddp_timeout",
    "stall_timeout",
    "fsdp_version",
    "fsdp_config",
    "dp_shard_size",
    "dp_replicate_size",
    "tensor_parallel_size",
    "context_parallel_size",
    "deepspeed",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    *RAY_KEYS,
    # What is written when; the weights on the way do not depend on it.
    "save_strategy",
    "save_steps",
    "saves_per_epoch",
    "save_first_step",
    "save_total_limit",
    "save_keep_every",
    "save_asynchronously",
    "save_dtype",
    "verify_saves",
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
    "stop_file",
    "eval_on_start",
    "eval_batch_size",
    "generate_samples",
    "num_generation_samples",
    "generation_max_new_tokens",
    # The plan pins their product, `global_batch_size` (D2).
    "micro_batch_size",
    "gradient_accumulation_steps",
}
"""Keys that may differ between a run and its continuation."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """The JSON-able values of every key that a resumed run must agree in."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in FREE_KEYS}


def identity_hash(config: TrainConfig) -> str:
    """Fingerprint of `identity(config)`."""
    return hash_json(identity(config))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: before → now` for every key in which two identities differ."""
    keys = sorted(before.keys() | now.keys())
    return [f"{key}: {before.get(key)!r} → {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]
