"""Which of transformers' auto classes loads a model: by the architecture that its config names."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

_WITH_IMAGES = frozenset(map(str, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()))
_CAUSAL = frozenset(map(str, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def is_vision_language(values: dict[str, Any]) -> bool:
    """Whether the config of a model names a class that takes images and text."""
    names = values.get("architectures") or [
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(values.get("model_type", "")), "")
    ]
    return any(name in _WITH_IMAGES and name not in _CAUSAL for name in names)


def auto_class(location: str, revision: str | None = None) -> Any:
    """AutoModelForImageTextToText for a vision-language model, else AutoModelForCausalLM."""
    values, _ = PreTrainedConfig.get_config_dict(location, revision=revision)
    return AutoModelForImageTextToText if is_vision_language(values) else AutoModelForCausalLM
