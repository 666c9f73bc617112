"""Load a tokenizer, add the config's tokens, and give the model a row for each of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eft.config.model import ModelConfig
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, ModelError, nearest
from eft.models.adapters import trained_base_parameters
from eft.models.load import check_gguf_file
from eft.models.location import resolve_location
from eft.models.seeding import seeded_rng

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SPARE_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "<|padding|>",
    "[PAD]",
    "<|fim_pad|>",
)
"""Names under which vocabularies carry a token meant for padding without declaring it, in order of preference."""

ROW_MULTIPLE = 32
NOISE_SCALE = 1e-3
"""Noise on new rows, relative to the spread of the existing ones: enough to tell two new tokens apart."""


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_config` or `base_model`, with `special_tokens` and `tokens` added and a pad token.

    Without a pad token of its own it takes a spare one of its vocabulary, else `eos`. That is safe here although it is
    the classic trap: eft's labels and attention masks come from the data, never from comparing ids with the pad id, so
    a real end-of-text token stays a target.

    Raises ModelError when there is no such tokenizer, ConfigError for an unknown role in `special_tokens`.
    """
    tokenizer = _load_plain(cfg)
    if cfg.special_tokens:
        for role in cfg.special_tokens:
            if role not in SPECIAL_ROLES:
                hint = nearest(role, SPECIAL_ROLES)
                raise ConfigError(
                    f"special_tokens: unknown role {role!r}"
                    + (f", did you mean {hint!r}?" if hint else f"; known: {', '.join(SPECIAL_ROLES)}")
                )
        tokenizer.add_special_tokens({role: _added(text) for role, text in cfg.special_tokens.items()})
    if cfg.tokens:
        # Adding a special token again would make it an ordinary one, which decoding no longer leaves out.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokenizer.add_tokens([_added(text) for text in cfg.tokens if text not in special])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _spare_pad_token(tokenizer)
    return tokenizer


def _load_plain(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    own = cfg.tokenizer_config is not None
    key, value = ("tokenizer_config", str(cfg.tokenizer_config)) if own else ("base_model", cfg.base_model)
    location = resolve_location(key, value)
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if not own:
        if cfg.revision_of_model is not None:
            options["revision"] = cfg.revision_of_model
        if cfg.gguf_file is not None:
            check_gguf_file(location, cfg.gguf_file)
            options["gguf_file"] = cfg.gguf_file
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise ModelError(
            f"{key}: no tokenizer could be loaded from {location}: {reason}; set tokenizer_config to a folder that "
            "holds tokenizer.json"
        ) from error
    return tokenizer


def _added(text: str) -> AddedToken:
    # Not normalised and not stripping its neighbours: the text around it is tokenised as if it were not there.
    return AddedToken(text, lstrip=False, rstrip=False, normalized=False)


def _spare_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    for token in SPARE_PAD_TOKENS:
        if token in vocabulary:
            return token
    if tokenizer.eos_token is None:
        raise ConfigError("special_tokens: the tokenizer has neither a pad token nor an eos token; set pad_token")
    return str(tokenizer.eos_token)


def new_tokens(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text → id of the tokens that the config added to the tokenizer's own vocabulary, by ascending id.

    Reads the untouched tokenizer again: afterwards nothing in a tokenizer tells our tokens from its own added ones.
    """
    wanted = [*(cfg.special_tokens or {}).values(), *(cfg.tokens or [])]
    if not wanted:
        return {}
    before = _load_plain(cfg).get_vocab()
    after = tokenizer.get_vocab()
    return dict(sorted(((text, after[text]) for text in wanted if text not in before), key=lambda pair: pair[1]))


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: TrainConfig, seed: int
) -> list[int]:
    """Give every token of `tokenizer` a row in the embedding and the output head; returns the ids of the new tokens.

    Rows are only ever added, and only when the tokenizer needs more (or `resize_token_embeddings_to_32x` asks for a
    multiple of 32). New rows, and spare rows that a new token now uses, start at the mean of the rows of the old
    vocabulary plus seeded noise, so that a new token begins as an average one. A tied head stays tied. Call this on the
    plain model, before the adapter.

    Raises ConfigError when tokens were added whose rows would never be trained; the message names the key to set.
    """
    added = new_tokens(cfg, tokenizer)
    old_rows = int(model.get_input_embeddings().weight.shape[0])
    wanted = rows_needed(tokenizer)
    needed = max(old_rows, wanted)
    if cfg.resize_token_embeddings_to_32x:
        needed = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    _check_new_rows_trained(model, tokenizer, cfg, added)
    if cfg.adapter is not None and needed > max(old_rows, wanted):
        raise ConfigError(
            f"resize_token_embeddings_to_32x: {needed} rows for {wanted} tokens; peft gives the base of an "
            "adapter exactly one row per token when it loads it, so leave this off with an adapter"
        )
    known_rows = min([old_rows, *added.values()])
    with seeded_rng(seed, model):
        if needed > old_rows:
            model.resize_token_embeddings(needed, mean_resizing=False)
        fresh = sorted({*added.values(), *range(old_rows, needed)})
        if fresh:
            _start_at_mean(model, known_rows, fresh)
    return list(added.values())


def check_no_new_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: ModelConfig) -> None:
    """Raise ModelError where `resize_embeddings` would have something to do: processes hold parts of this embedding."""
    rows, needed, added = model.config.get_text_config().vocab_size, rows_needed(tokenizer), new_tokens(cfg, tokenizer)
    if needed > rows or added:
        what = f"new tokens ({', '.join(map(repr, list(added)[:4]))})" if added else f"{needed} rows instead of {rows}"
        raise ModelError(
            f"base_model: the tokenizer asks for {what}, but an embedding that is split while it is loaded is not "
            "changed. Make a base model with these rows on one process first (a run with `learning_rate: 0`), or shard "
            "with `fsdp_version: 2` alone."
        )


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embedding rows that hold every id of the tokenizer; more than its tokens where its ids leave gaps."""
    highest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), highest + 1)


def _check_new_rows_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cfg: TrainConfig, added: dict[str, int]
) -> None:
    """A pad token may keep its first row for ever: it is no target and nothing attends to it."""
    only_padding = tokenizer.pad_token if tokenizer.pad_token != tokenizer.eos_token else None
    learnt = [text for text in added if text != only_padding]
    if not learnt:
        return
    shown = ", ".join(repr(text) for text in learnt[:4])
    names = embedding_modules(model)
    if cfg.adapter is not None:
        if cfg.peft_trainable_token_indices == "new" or cfg.adapter == "peft":
            return
        rows = cfg.peft_trainable_token_indices
        by_module = rows if isinstance(rows, dict) else dict.fromkeys(names[:1], rows or [])
        covers = {name for name, ids in by_module.items() if {added[text] for text in learnt} <= set(ids)}
        saved = [*(cfg.lora_modules_to_save or []), *covers]
        trained = [name for name in names if any(name.endswith(entry) for entry in saved)]
        if len(trained) < (1 if _is_tied(model) else len(names)):
            wanted = ", ".join(name.rpartition(".")[2] for name in (names[:1] if _is_tied(model) else names))
            raise ConfigError(
                f"tokens: {shown} would be new to the model, and with an adapter their embeddings are not trained; "
                f"set peft_trainable_token_indices: new, or lora_modules_to_save: [{wanted}]"
            )
        return
    trained_names = trained_base_parameters(model, cfg)
    frozen = [f"{name}.weight" for name in names if f"{name}.weight" not in trained_names]
    if frozen:
        patterns = ", ".join(f"'^{name}$'" for name in frozen)
        what_to_do = "add to unfrozen_parameters:"
        if cfg.train_top_layers is not None:
            what_to_do = "instead of train_top_layers list the layers in unfrozen_parameters, together with"
        raise ConfigError(
            f"tokens: {shown} would be new to the model, and {' and '.join(frozen)} would stay frozen; "
            f"{what_to_do} {patterns}"
        )


def embedding_modules(model: PreTrainedModel) -> list[str]:
    """Names of the input embedding and of the output head, if there is one, in the order of the model."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


@torch.no_grad()
def _start_at_mean(model: PreTrainedModel, known_rows: int, fresh: list[int]) -> None:
    """Set rows `fresh` of the embedding, and of an untied head, to the mean of rows [0, known_rows) plus noise."""
    heads = [] if _is_tied(model) or model.get_output_embeddings() is None else [model.get_output_embeddings()]
    for module in (model.get_input_embeddings(), *heads):
        weight = module.weight  # [rows, hidden]
        known = weight[:known_rows].float()
        noise = torch.randn(len(fresh), weight.shape[1], device=weight.device) * (NOISE_SCALE * known.std(dim=0))
        weight[fresh] = (known.mean(dim=0) + noise).to(weight.dtype)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias[fresh] = bias[:known_rows].float().mean().to(bias.dtype)
