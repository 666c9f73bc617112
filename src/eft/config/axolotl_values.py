"""Values that Axolotl accepts and eft does not, with what to write instead."""

from __future__ import annotations

import re
from typing import Any

_ADAMW = "use `adamw_torch_fused`"
_LOW_RANK = "not offered: `adamw_8bit` and `adamw_torch_4bit` keep as little, and resume exactly"
_PLAIN_TEMPLATE = (
    "use `tokenizer_default` (the template that comes with the model), a built-in one (docs/templates.md), such as "
    "`chatml`, or a Jinja file's path"
)
_TYPED_FORMAT = (
    "use `alpaca` with `field_*`, `chat_template` with `field_messages`, a mapping with a prompt (`format`, …), "
    "or `package.module:function`"
)
_OWN_PROMPT = "write the prompt as a mapping: `type: {format: …, no_input_format: …, field_instruction: …}`"
_OWN_FUNCTION = "not offered: join thought, reflection and answer in a function of your own, `package.module:function`"

REFUSED_FORMATS = {
    "llama2_chat": "use `type: sharegpt` with `chat_template: llama2`",
    "creative_acr": "use `creative_acr.load_answer`",
    "creative_acr.load_critique": _OWN_PROMPT,
    "creative_acr.load_revise": _OWN_PROMPT,
    "reflection": _OWN_FUNCTION,
    "reflection:instruct": _OWN_FUNCTION,
    "reflection:chat": _OWN_FUNCTION,
    "messages": "use `chat_template`",
    "messages.chat": "use `chat_template`",
    "stepwise_supervised": "eft does supervised fine-tuning only: process rewards are not offered",
    "bradley_terry": "eft does supervised fine-tuning only: reward models are not offered",
    "_synthetic": "write random rows to a file: `{input_ids: […], labels: […]}`, without `type`",
    "alpaca_chat.load": "use `alpaca_chat`",
    "alpaca_instruct.load": "use `alpaca_instruct`",
    "alpaca_w_system.load": "use `alpaca_w_system`",
}
"""Values of `type` that Axolotl has and eft has not."""

_VALUES: dict[str, dict[Any, str]] = {
    "adapter": {
        "llama-adapter": "use `lora`",
        "dora": "use `adapter: lora` and `peft_use_dora: true`",
        "none": "leave the key out for full fine-tuning",
    },
    "optimizer": {
        "adamw": "use `adamw_torch_fused`",
        "adamw_hf": "use `adamw_torch_fused`",
        "adam": "use `adamw_torch_fused`",
        "lion": "use `lion_pytorch`",
        "adopt": "use `adopt_adamw`",
        "came": "use `came_pytorch`",
        "optimi_adamw": _ADAMW,
        "adamw_apex_fused": _ADAMW,
        "adamw_torch_npu_fused": "eft runs on CPU and CUDA: use `adamw_torch_fused`",
        "adamw_torch_xla": "eft runs on CPU and CUDA: use `adamw_torch_fused`",
        "adamw_anyprecision": "use `adamw_torch_fused` with `bfloat16: true`, whose updates lose nothing",
        "dion": "use `muon`",
        "sinkgd": "use `muon`, or `sgd`",
        "lomo": "use `sgd` with `optimizer_in_backward: true`, which is LOMO",
        "adalomo": "use `adafactor` with `optimizer_in_backward: true`",
        "grokadamw": "use `ademamix`, which also has a slow moment",
        "q_galore_adamw8bit": _LOW_RANK,
    },
    "lr_scheduler": {
        "reduce_lr_on_plateau": "a plateau cannot be planned ahead: use `cosine` or `linear`",
        "greedy": "it follows the losses, so no step's rate is known ahead: use `cosine`",
        "wsd": "use `warmup_stable_decay`",
    },
    "activation_offloading": {
        "legacy": "use `true`",
        "disk": "use `true`: activations go to host memory",
        "hidden_states": "use `true`",
    },
    "gradient_checkpointing": {
        "offload": "use `true`, with `activation_offloading: true`",
        "offload_disk": "use `true`, with `activation_offloading: true`",
        "unsloth": "use `true`, with `activation_offloading: true`",
    },
    "tf32": {"auto": "use `true`, or leave the key out: eft leaves it off"},
    "bf16": {"full": "use `bfloat16: true`, for weights in bf16 too"},
    "torch_compile": {"auto": "use `true`"},
    "torch_compile_mode": {
        "reduce-overhead": "use `default`: a CUDA graph serves rows of one length only",
        "max-autotune": "use `max-autotune-no-cudagraphs`: a CUDA graph serves rows of one length only",
    },
    "type": REFUSED_FORMATS,
    "train_on_eos": {"false": "use `none`", "true": "use `turn`"},
}


def value_advice(key: str, value: Any) -> str | None:
    """What to write instead of a value that Axolotl accepts and eft does not; None when there is nothing to say."""
    if key == "selective_checkpointing" and isinstance(value, dict):
        return "write the list of its `save`: `[attention]`, or `[attention, matmul]`"
    if key in ("datasets", "test_datasets") and isinstance(value, (list, str)):
        paths = value if isinstance(value, list) else [value]
        return f"write `- path: {paths[0]}`" if paths and isinstance(paths[0], str) else None
    if key == "special_tokens" and isinstance(value, dict) and "additional_special_tokens" in value:
        return "list `additional_special_tokens` under `tokens`"
    if not isinstance(value, str):
        return None
    if advice := _VALUES.get(key, {}).get(value.lower()):
        return advice
    if key == "optimizer" and value.lower().startswith(("galore", "apollo")):
        return _LOW_RANK
    if key == "optimizer" and any(mark in value.lower() for mark in ("adam", "8bit", "4bit", "paged", "flash")):
        return _ADAMW
    if key == "attn_implementation":
        return "leave the key out: `eft` runs each packed document by itself with the best kernel of the machine"
    if key == "type" and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value):
        module, _, name = value.rpartition(".")
        return f"for a function of your own write `{module}:{name}`; of the built-in formats {_TYPED_FORMAT}"
    if key == "type":
        return "use `chat_template`" if value.startswith(("sharegpt", "chat", "messages")) else _TYPED_FORMAT
    return _PLAIN_TEMPLATE if key == "chat_template" else None
