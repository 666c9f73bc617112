"""Which model and tokenizer, which of their weights are trained, and through which adapter."""

from __future__ import annotations

from typing import Any, Literal

from eft.config.section import Section, key

AttnImplementation = Literal["eft", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]

AdapterKind = Literal["lora", "qlora", "peft"]


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
    processor_type: str | None = key(
        None,
        "`AutoProcessor`, or the name of a processor class of transformers: rows are conversations with images, and go "
        "through the processor of `base_model`.",
    )
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
    load_in_4bit: bool = key(
        False, "Hold the linear layers of the frozen base in 4 bits (QLoRA), through bitsandbytes; needs an adapter."
    )
    load_in_8bit: bool = key(
        False, "Hold the linear layers of the frozen base in 8 bits, through bitsandbytes; needs an adapter."
    )
    bnb_config_kwargs: dict[str, Any] | None = key(
        None,
        "Options of the 4- or 8-bit base: `bnb_4bit_quant_type` (`nf4`), `bnb_4bit_use_double_quant` (true), "
        "`bnb_4bit_compute_dtype` (the run's), `bnb_4bit_quant_storage` (`uint8`), `llm_int8_threshold` (6.0), "
        "`llm_int8_skip_modules`.",
        axolotl="There the storage dtype is bfloat16; the bytes are the same.",
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

    adapter: AdapterKind | None = key(
        None,
        "Train an adapter instead of the model's own weights. `qlora`: LoRA over a base in 4 bits; `peft`: any other "
        "method of peft, described by `peft`.",
    )
    lora_r: int = key(8, "Rank of the LoRA factors.", ge=1, used_when="adapter")
    lora_alpha: int = key(16, "LoRA scale; the factors' product is multiplied by alpha / r.", ge=1, used_when="adapter")
    lora_dropout: float = key(0.0, "Dropout on the adapter's input.", ge=0.0, lt=1.0, used_when="adapter")
    lora_target_modules: list[str] | str | None = key(
        None, "Names of the linear layers to adapt, or one regular expression.", used_when="adapter"
    )
    lora_target_linear: bool = key(False, "Adapt every linear layer but the output head.", used_when="adapter")
    lora_target_parameters: list[str] | None = key(
        None,
        "Ends of the names of parameters to adapt that are no linear layer's, such as the fused experts "
        "`mlp.experts.gate_up_proj` and `mlp.experts.down_proj`.",
        used_when="adapter",
    )
    lora_exclude_modules: list[str] | str | None = key(
        None, "Names of layers, or one regular expression, that the targets are not to include.", used_when="adapter"
    )
    lora_rank_pattern: dict[str, int] | None = key(
        None, "Other ranks by the end of a layer's name or a regular expression: `{q_proj: 16}`.", used_when="adapter"
    )
    lora_alpha_pattern: dict[str, int] | None = key(
        None, "Other alphas by the end of a layer's name or a regular expression.", used_when="adapter"
    )
    lora_modules_to_save: list[str] | None = key(
        None, "Modules trained whole beside the adapter, such as `embed_tokens`.", used_when="adapter"
    )
    lora_model_dir: str | None = key(None, "Start from this trained adapter.", used_when="adapter")
    peft_use_dora: bool = key(False, "Weight-decomposed LoRA (DoRA).", used_when="adapter")
    peft_use_rslora: bool = key(False, "Rank-stabilised scale: alpha / √r.", used_when="adapter")
    peft_init_lora_weights: bool | str | None = key(
        None,
        "How the factors start: true (A random, B zero), `gaussian`, `orthogonal`, false (both random), or from the "
        "weights: `pissa`, `pissa_niter_4` (faster), `olora`; these are saved as plain LoRA of twice the rank.",
        used_when="adapter",
        axolotl="There `pissa` and `olora` change the base's weights, and so has everyone to who loads the adapter.",
    )
    peft_layers_to_transform: list[int] | int | None = key(
        None, "Adapt only the layers with these numbers.", used_when="adapter"
    )
    peft_layers_pattern: list[str] | str | None = key(
        None, "Name of the list that `peft_layers_to_transform` counts in.", used_when="peft_layers_to_transform"
    )
    peft_trainable_token_indices: Literal["new"] | list[int] | dict[str, list[int]] | None = key(
        None,
        "Rows of the embedding that are trained beside the adapter, by token id (or by module: `{embed_tokens: [5]}`); "
        "`new`: those of the tokens that the config adds.",
        used_when="adapter",
    )
    peft: dict[str, Any] | None = key(
        None,
        "Further options of peft's own config, by its names; with `adapter: peft` the whole of it, with `peft_type`.",
        used_when="adapter",
    )
