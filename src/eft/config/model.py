"""Which model and tokenizer, which of their weights are trained, and through which adapter."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key

AttnImplementation = Literal["eft", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]


class ModelConfig(Section):
    """The base model and its tokenizer."""

    base_model: str = key(description="Folder or hub id of the model, in Hugging Face form.", min_length=1)
    gguf_file: str | None = key(
        None,
        "Name of a GGUF file inside `base_model`; its weights are de-quantised into a plain model that can be saved.",
    )
    revision_of_model: str | None = key(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = key(False, "Run code that comes with the model. Off: such a model is refused by name.")
    tokenizer_config: str | None = key(None, "Folder or hub id of the tokenizer; default: that of `base_model`.")
    special_tokens: dict[str, str] | None = key(
        None, "Special tokens by role, such as `{pad_token: '<|pad|>'}`; tokens the vocabulary lacks are added."
    )
    tokens: list[str] | None = key(None, "Tokens to add to the vocabulary; their embeddings are trained or refused.")
    resize_token_embeddings_to_32x: bool = key(False, "Round the vocabulary up to a multiple of 32 rows.")
    attn_implementation: AttnImplementation = key(
        "eft",
        "Attention kernel. `eft` runs each packed document by itself on whatever the machine has.",
        axolotl="Axolotl's default is the model's own; there, packing with it lets documents see each other.",
    )


class FreezingConfig(Section):
    """Which of the base model's weights are trained, when not all."""

    unfrozen_parameters: list[str] | None = key(
        None, "Regular expressions; only the parameters whose name matches one are trained."
    )
    train_top_layers: int | None = key(
        None, "Train only the last N decoder layers and the final norm; the rest stays frozen.", ge=1
    )


class AdapterConfig(Section):
    """Parameter-efficient fine-tuning through peft."""

    adapter: Literal["lora"] | None = key(None, "Train an adapter instead of the model's own weights.")
    lora_r: int = key(8, "Rank of the LoRA factors.", ge=1, used_when="adapter")
    lora_alpha: int = key(16, "LoRA scale; the factors' product is multiplied by alpha / r.", ge=1, used_when="adapter")
    lora_dropout: float = key(0.0, "Dropout on the adapter's input.", ge=0.0, lt=1.0, used_when="adapter")
    lora_target_modules: list[str] | str | None = key(
        None, "Names of the linear layers to adapt, or one regular expression.", used_when="adapter"
    )
    lora_target_linear: bool = key(False, "Adapt every linear layer but the output head.", used_when="adapter")
    lora_modules_to_save: list[str] | None = key(
        None, "Modules trained whole beside the adapter, such as `embed_tokens`.", used_when="adapter"
    )
    lora_model_dir: str | None = key(None, "Start from this trained adapter.", used_when="adapter")
    peft_use_dora: bool = key(False, "Weight-decomposed LoRA (DoRA).", used_when="adapter")
    peft_use_rslora: bool = key(False, "Rank-stabilised scale: alpha / √r.", used_when="adapter")
