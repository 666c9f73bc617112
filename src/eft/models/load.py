"""Load a base model: from a Hugging Face folder, the hub, or a GGUF file, always as a plain model that can be saved."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eft.config.model import ModelConfig
from eft.core.errors import ModelError, nearest
from eft.models.auto_class import auto_class, is_vision_language
from eft.models.location import is_local, nearest_folder, resolve_location
from eft.models.plain import base_model_of
from eft.models.quantised import element_count, quantisation_of, quantised
from eft.models.seeding import seeded_rng

_LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""What families call their table of learned positions."""

TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GGUF_DTYPE = torch.bfloat16
"""A GGUF file has no training dtype of its own. Its blocks carry 4 to 8 bits, which bf16 holds well enough."""


def load_model(
    cfg: ModelConfig, *, compute_dtype: torch.dtype, seed: int, distributed: DistributedConfig | None = None
) -> PreTrainedModel:
    """Load `cfg.base_model` in its checkpoint's dtype, on the CPU, in evaluation mode.

    A GGUF file is de-quantised to bf16. `load_in_4bit` and `load_in_8bit` quantise the linear layers, on the device
    that trains. A checkpoint in a dtype that cannot be trained (float64, float8) comes in `compute_dtype`.
    `attn_implementation: eft` is left to `attention.install_attention`; any other name goes to transformers. Nothing is
    drawn from the global RNG. `distributed`: each process reads only its part of the weights.

    Raises ModelError when there is no such model, when it is not a causal language model, needs code of its own that
    `trust_remote_code` does not allow, is quantised, or lacks weights.
    """
    location = resolve_location("base_model", cfg.base_model)
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if cfg.revision_of_model is not None:
        options["revision"] = cfg.revision_of_model
    if cfg.attn_implementation != "eft":
        options["attn_implementation"] = cfg.attn_implementation
    if distributed is not None:
        options["distributed_config"] = distributed
    bits = quantisation_of(cfg, compute_dtype)
    if cfg.gguf_file is not None:
        check_gguf_file(location, cfg.gguf_file)
        options |= {"gguf_file": cfg.gguf_file, "quantization_config": GgufConfig(dequantize=True), "dtype": GGUF_DTYPE}
    else:
        dtype = check_causal_lm(location, cfg)
        options["dtype"] = compute_dtype if dtype not in (None, *TRAINABLE_DTYPES) else "auto"
        if bits is not None:
            options["quantization_config"] = bits
    with seeded_rng(seed):
        model, info = _from_pretrained(location, options)
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(
            f"base_model: {location} lacks {len(names)} weights of a {type(model).__name__}, which would start at "
            f"random: {', '.join(names[:3])}. Use a complete causal language model."
        )
    return quantised(model, bits) if bits is not None and cfg.gguf_file is not None else model


def model_without_weights(cfg: ModelConfig) -> PreTrainedModel:
    """What `cfg.base_model` is, from its config alone: on the meta device. Raises ModelError as `load_model`."""
    location = resolve_location("base_model", cfg.base_model)
    check_causal_lm(location, cfg)
    options = {"trust_remote_code": cfg.trust_remote_code, "revision": cfg.revision_of_model or "main"}
    config = AutoConfig.from_pretrained(location, **options)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    return cast("PreTrainedModel", model)


def _from_pretrained(location: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        loader = auto_class(location, options.get("revision")) if "gguf_file" not in options else AutoModelForCausalLM
        loaded = loader.from_pretrained(location, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"base_model: {location} could not be loaded: {_first_lines(error)}") from error
    return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)


def check_gguf_file(location: str, gguf_file: str) -> None:
    """Raise ModelError when the GGUF reader or the file is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("gguf_file: reading GGUF needs the package `gguf`; install eft-trainer[gguf]")
    if is_local(location) and not Path(location, gguf_file).is_file():
        files = sorted(path.name for path in Path(location).glob("*.gguf"))
        close = nearest(gguf_file, files)
        there = f"did you mean {close}?" if close else f"there are: {', '.join(files) or 'no .gguf files'}"
        raise ModelError(f"gguf_file: there is no {gguf_file} in {location}; {there}")


def check_causal_lm(location: str, cfg: ModelConfig) -> torch.dtype | None:
    """Look at config.json alone; returns the dtype it names, if any. Raises ModelError naming what the model is."""
    if is_local(location) and not Path(location, "config.json").is_file():
        raise ModelError(f"base_model: {location} has no config.json{_folder_advice(Path(location))}")
    try:
        values, _ = PreTrainedConfig.get_config_dict(location, revision=cfg.revision_of_model)
    except (OSError, ValueError) as error:
        beside = nearest_folder(Path(location).absolute())
        raise ModelError(
            f"base_model: {location} is no folder here{beside} and could not be read from the hub: "
            f"{_first_lines(error)}"
        ) from error
    if not values:
        raise ModelError(f"base_model: {location} could not be read from the hub, and there is no such folder here")
    _check_architecture(location, values, cfg)
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"base_model: {location} is quantised ({method}); use the unquantised model of the same name")
    name = str(values.get("dtype") or values.get("torch_dtype") or "")
    dtype = getattr(torch, name, None) if name else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _check_architecture(location: str, values: dict[str, Any], cfg: ModelConfig) -> None:
    model_type, trust_remote_code = str(values.get("model_type", "")), cfg.trust_remote_code
    if "auto_map" in values and (trust_remote_code or model_type not in CONFIG_MAPPING_NAMES):
        if trust_remote_code:
            return
        code = ", ".join(sorted({str(value).split(".")[0] + ".py" for value in values["auto_map"].values()}))
        raise ModelError(
            f"base_model: {location} needs its own code ({code}); read it, and if you trust it set "
            "trust_remote_code: true"
        )
    if model_type not in CONFIG_MAPPING_NAMES:
        close = nearest(model_type, CONFIG_MAPPING_NAMES)
        hint = f"; nearest known: {close}" if close else ""
        raise ModelError(f"base_model: {location}: transformers knows no model_type {model_type!r}{hint}")
    if cfg.processor_type is not None:
        if not is_vision_language(values):
            raise ModelError(f"processor_type: {location} is a {model_type}, which takes no images; remove it")
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    names = values.get("architectures") or ([causal] if causal else [])
    bare = [name.removesuffix("Model") for name in names]  # "LlamaModel": a decoder without head, missing keys tell
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    fits = any(name in known for name in names) or any(f"{stem}ForCausalLM" in known for stem in bare)
    if causal is None or values.get("is_encoder_decoder") or not fits:
        what = ", ".join(names) or model_type
        hint = ""
        if is_vision_language(values):
            hint = "; to train it on rows with images set `processor_type: AutoProcessor`"
        raise ModelError(f"base_model: {location} is a {what}, not a causal language model{hint}")


def _folder_advice(folder: Path) -> str:
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"; to load its GGUF file set gguf_file: {ggufs[0]}"
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter: set base_model to its base and lora_model_dir to this folder"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; did you mean {folder / inner[0]}?" if inner else ""


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).strip().splitlines()[:2])


def base_dtype(model: PreTrainedModel | PeftModel) -> torch.dtype:
    """The dtype of the base checkpoint: what the config recorded at load, else that of most parameters.

    Still right after `set_dtypes` has raised the trainable parameters to fp32.
    """
    recorded = base_model_of(model).config.dtype
    if isinstance(recorded, torch.dtype):
        return recorded
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _position_rows(base: PreTrainedModel) -> int | None:
    """Tokens of a document that a model with a table of learned positions can number; None where it computes them."""
    shape = base.config.get_text_config()
    limit = getattr(shape, "max_position_embeddings", None)
    for name, module in base.named_modules():
        learned = isinstance(module, nn.Embedding) and module is not base.get_input_embeddings()
        if limit is not None and learned and name.rpartition(".")[2] in _LEARNED_POSITIONS:
            return int(limit)
    return None


def describe_model(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Numbers for the start-up table and for balancing ranks.

    `attention_cost_ratio` k makes `tokens + k·Σ len²` proportional to a forward pass over documents of length len: a
    token costs 2·P in the matrix products (P parameters without the input embedding) and 4·len·width·layers in
    attention, so k = 2·layers·width / P.
    """
    base = base_model_of(model)
    shape = base.config.get_text_config()
    # State-space models have no attention: their cost is linear in the tokens.
    heads = int(getattr(shape, "num_attention_heads", 0))
    head_dim = int(getattr(shape, "head_dim", None) or shape.hidden_size // heads) if heads else 0
    total = trainable = 0
    bytes_by_dtype: Counter[str] = Counter()
    for parameter in model.parameters():
        total += element_count(parameter)
        trainable += parameter.numel() if parameter.requires_grad else 0
        bytes_by_dtype[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() * parameter.element_size()
    embedding = base.get_input_embeddings().weight
    output = base.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    multiplied = max(1, total - (0 if tied else embedding.numel()))
    layers = int(shape.num_hidden_layers)
    return {
        "architecture": type(base).__name__,
        "model_type": base.config.model_type,
        "parameters": total,
        "trainable_parameters": trainable,
        "bytes_by_dtype": dict(bytes_by_dtype),
        "layers": layers,
        "hidden_size": int(shape.hidden_size),
        "heads": heads,
        "head_dim": head_dim,
        "vocabulary_rows": int(embedding.shape[0]),
        "position_rows": _position_rows(base),
        "tied_embeddings": tied,
        "base_dtype": str(base_dtype(model)).removeprefix("torch."),
        "attention_cost_ratio": 2.0 * layers * heads * head_dim / multiplied,
    }
