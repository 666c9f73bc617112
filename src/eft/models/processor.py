"""Load the processor of a vision-language model: tokenizer, image processor and template in one."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from eft.config.model import ModelConfig
from eft.core.errors import ConfigError, ModelError
from eft.models.location import resolve_location


def load_processor(cfg: ModelConfig, processor_type: str, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of `base_model`, by `processor_type`, with `tokenizer` for its own.

    `tokenizer` is the run's, with its special tokens and pad token; its template is the processor's, where it has none.

    Raises ConfigError for a name that is no processor class, ModelError where the model has no such processor, or one
    that does not say where it puts image tokens.
    """
    kind = getattr(transformers, processor_type, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ConfigError(
            f"processor_type: transformers has no class {processor_type!r}; expected `AutoProcessor`, or a name such "
            "as `Qwen2VLProcessor`"
        )
    location = resolve_location("base_model", cfg.base_model)
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if cfg.revision_of_model is not None:
        options["revision"] = cfg.revision_of_model
    try:
        processor = kind.from_pretrained(location, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise ModelError(f"processor_type: no processor could be loaded from {location}: {reason}") from error
    check_processor(processor)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    return processor


def check_processor(processor: Any) -> None:
    """Raise ModelError where rows with images could not go through `processor`."""
    name = type(processor).__name__
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"processor: {name} has no image processor; rows with images need one")
    if getattr(processor, "image_token", None) is None:
        raise ModelError(f"processor: {name} names no `image_token`, so its image tokens cannot be told from text")
