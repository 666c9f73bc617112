"""From config to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from eft.config.parallel import asks_for_parts
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError

MAX_INTERVAL = 10**9
"""Interval given to upstream for what our flow decides: never reached by its own counting."""


def build_training_arguments(
    config: TrainConfig,
    *,
    accumulation: int,
    compute_dtype: torch.dtype,
    device_type: str,
    max_steps: int | None,
    has_eval: bool,
    deepspeed: dict[str, Any] | None = None,
) -> TrainingArguments:
    """What Trainer needs to know. What eft does itself (plan, flow, saving, loss) is switched off upstream.

    Args:
        accumulation: micro-batches per optimizer step and rank.
        compute_dtype: dtype of autocast; fp32 means none.
        device_type: `cpu` or `cuda`.
        max_steps: optimizer steps if known; the plan sets the number that is executed when `train()` starts.
        has_eval: whether there are or may come held-out data.
        deepspeed: its configuration, which then says what autocast does.
    """
    evaluate = has_eval and config.eval_strategy != "no"
    return TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.eval_batch_size or config.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=config.num_epochs,
        max_steps=max_steps or -1,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        bf16=compute_dtype == torch.bfloat16 and deepspeed is None,
        fp16=compute_dtype == torch.float16,
        tf32=config.tf32 if device_type == "cuda" else None,
        # Told so, accelerate leaves DeepSpeed out; it finds by itself that there is nothing else.
        use_cpu=device_type == "cpu" and deepspeed is None,
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": deepspeed is not None and device_type == "cpu"},
        full_determinism=config.deterministic,
        seed=config.seed,
        # The plan's loader is sized for the whole run and starts at the cursor (D1).
        ignore_data_skip=True,
        remove_unused_columns=False,
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_pin_memory=config.dataloader_pin_memory and device_type == "cuda",
        # Upstream's filter reads the loss back on every micro-batch, and hides NaN.
        logging_nan_inf_filter=False,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=MAX_INTERVAL if evaluate else None,
        # Upstream would refuse to save a model that was split while it was loaded; it is ours that saves.
        save_strategy="no" if config.save_strategy == "no" or asks_for_parts(config) else "steps",
        save_steps=MAX_INTERVAL,
        save_total_limit=None,
        save_only_model=config.save_only_model,
        load_best_model_at_end=config.load_best_model_at_end,
        metric_for_best_model=config.metric_for_best_model if evaluate else None,
        greater_is_better=config.greater_is_better,
        eval_on_start=config.eval_on_start and evaluate,
        disable_tqdm=True,
        report_to=_reporters(config),
        run_name=config.wandb_name or config.mlflow_run_name or config.trackio_run_name,
        # Trackio's alone.
        project=config.trackio_project_name or "eft",
        ddp_timeout=config.ddp_timeout,
        ddp_find_unused_parameters=config.ddp_find_unused_parameters,
        ddp_bucket_cap_mb=config.ddp_bucket_cap_mb,
        torch_empty_cache_steps=config.torch_empty_cache_steps,
    )


def require_trackers(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker whose package is missing; its Trainer integration would only fail by then."""
    packages = {
        "use_tensorboard": "tensorboard",
        "use_wandb": "wandb",
        "use_mlflow": "mlflow",
        "use_trackio": "trackio",
    }
    for key, package in packages.items():
        if getattr(config, key) and find_spec(package) is None:
            raise ConfigError(f"{key}: needs the package {package}; pip install 'eft-trainer[{package}]'.")
    address = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if config.use_mlflow and address is None and find_spec("sqlalchemy") is None:
        raise ConfigError(
            "use_mlflow: where to? Without an address MLflow wants a database, and the package sqlalchemy is missing. "
            f"Set `mlflow_tracking_uri`, such as file:{Path(config.output_dir).resolve() / 'mlruns'}"
        )


def set_tracker_environment(config: TrainConfig) -> None:
    """Hand names and addresses to the trackers the way their Trainer integrations read them."""
    values = {
        "WANDB_PROJECT": config.wandb_project if config.use_wandb else None,
        "WANDB_ENTITY": config.wandb_entity if config.use_wandb else None,
        "MLFLOW_TRACKING_URI": config.mlflow_tracking_uri if config.use_mlflow else None,
        # MLflow 3 keeps its file store behind this; whoever writes `file:` has chosen it.
        "MLFLOW_ALLOW_FILE_STORE": "true" if config.use_mlflow and is_file_store(config.mlflow_tracking_uri) else None,
        "MLFLOW_EXPERIMENT_NAME": config.mlflow_experiment_name if config.use_mlflow else None,
    }
    for name, value in values.items():
        if value is not None:
            os.environ[name] = value


def is_file_store(uri: str | None) -> bool:
    """Whether MLflow is to write into a local folder."""
    return uri is not None and uri.startswith("file:")


def _reporters(config: TrainConfig) -> list[str]:
    wanted = {
        "tensorboard": config.use_tensorboard,
        "wandb": config.use_wandb,
        "mlflow": config.use_mlflow,
        "trackio": config.use_trackio,
    }
    return [name for name, on in wanted.items() if on] or ["none"]
