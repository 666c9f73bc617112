"""The names of the built-in chat templates."""

from __future__ import annotations

FALLBACK = "tokenizer_default_fallback_"
"""With a built-in name behind it: the tokenizer's own template where it has one, else that."""

_CHATML = ("<|im_start|>", "<|im_end|>")
_TEKKEN = ("[INST]", "[/INST]")
_COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

BUILT_IN_TEMPLATES: dict[str, tuple[str, ...]] = {
    "alpaca": (),
    "aya": _COHERE,
    "chatml": _CHATML,
    "cohere": _COHERE,
    "deepseek_v2": ("<｜User｜>", "<｜Assistant｜>"),
    "deepseek_v3": ("<｜User｜>", "<｜Assistant｜>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": ("<|header_start|>", "<|header_end|>", "<|eot|>"),
    "mistral_v1": (),
    "mistral_v2v3": (),
    "mistral_v3_tekken": _TEKKEN,
    "mistral_v7_tekken": (*_TEKKEN, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "phi_3": _PHI,
    "phi_35": _PHI,
    "phi_4": (*_CHATML, "<|im_sep|>"),
    "qwen_25": _CHATML,
    "qwen3": _CHATML,
    "vicuna": (),
    "zephyr": (),
}
"""Name → the tokens that the tokenizer must have for it. `data/templates` has a file for each."""
