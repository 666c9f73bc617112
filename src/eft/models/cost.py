"""What a token costs in attention, known from a model's config alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eft.config.model import ModelConfig
from eft.models.load import check_causal_lm, check_gguf_file, describe_model
from eft.models.location import resolve_location


def attention_cost_ratio(cfg: ModelConfig) -> float:
    """k in tokens + k·Σ len² of `cfg.base_model`, without its weights: from a model on the meta device.

    Raises ModelError where `load_model` would, as far as that is known without weights.
    """
    location = resolve_location("base_model", cfg.base_model)
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if cfg.revision_of_model is not None:
        options["revision"] = cfg.revision_of_model
    if cfg.gguf_file is not None:
        check_gguf_file(location, cfg.gguf_file)
        options["gguf_file"] = cfg.gguf_file
    else:
        check_causal_lm(location, cfg)
    config = AutoConfig.from_pretrained(location, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    return float(describe_model(model)["attention_cost_ratio"])
