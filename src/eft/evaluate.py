"""Held-out loss without a training."""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eft.builder import HFCausalTrainerBuilder
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, ModelError
from eft.inputs import load_datasets, load_trainable_model, prepare_tokenizer
from eft.models.load import load_model
from eft.models.tokenizer import resize_embeddings
from eft.runtime.env import Environment, resolve_precision


def evaluate_model(config: TrainConfig, model_path: str | None = None) -> dict[str, float]:
    """Loss and perplexity on each of the config's held-out data sets.

    Args:
        config: of the run; its tokenizer, template and masks define the held-out tokens.
        model_path: folder of an export or an adapter to evaluate instead of `base_model`.

    Raises:
        ConfigError: the config has no held-out data.
        ModelError: `model_path` is no model.
    """
    tokenizer = prepare_tokenizer(config)
    meta = load_datasets(config, tokenizer)
    if meta.eval_dataset is None:
        raise ConfigError("eft evaluate needs held-out data: set `val_set_size` or `test_datasets`")
    model = (
        load_trainable_model(config, tokenizer) if model_path is None else load_trained(config, tokenizer, model_path)
    )
    with tempfile.TemporaryDirectory() as folder:
        # No tracker hears of it: that would start a run there.
        trackers = dict.fromkeys(("use_tensorboard", "use_wandb", "use_mlflow", "use_trackio"), False)
        update = {"output_dir": folder, "adapter": None, **trackers}
        builder = HFCausalTrainerBuilder(config.model_copy(update=update), model, tokenizer, meta.processor)
        builder.eval_dataset = meta.eval_dataset
        trainer = builder.build()
        metrics = trainer.evaluate(meta.eval_dataset)
    return {name: value for name, value in metrics.items() if name.endswith(("_loss", "_ppl"))}


def load_trained(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, model_path: str
) -> PreTrainedModel | PeftModel:
    """A full export, or an adapter's folder on the config's base model.

    Raises:
        ModelError: no such folder, or it holds no model.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        raise ModelError(f"{model_path}: no such folder")
    compute_dtype = resolve_precision(config, Environment.detect()).compute_dtype
    if (folder / "adapter_config.json").is_file():
        # Not by peft's own loader, which knows nothing of GGUF files and added tokens.
        base = load_model(config, compute_dtype=compute_dtype, seed=config.seed)
        resize_embeddings(base, tokenizer, config, seed=config.seed)
        return PeftModel.from_pretrained(base, folder)
    update = {"base_model": model_path, "gguf_file": None, "revision_of_model": None}
    return load_model(config.model_copy(update=update), compute_dtype=compute_dtype, seed=config.seed)
