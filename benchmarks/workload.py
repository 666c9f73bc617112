"""What every contender trains: the same random weights, the same samples, and eft's plan as ready rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eft.core.constants import IGNORE_INDEX
from eft.core.records import TokenSample
from eft.data.plan import build_plan
from eft.data.store import TokenStore, open_store, write_store

Ints = npt.NDArray[np.int64]

WEIGHTS_SEED = 1
ROWS_VERSION = 3
"""Raise when the rows of the same options change."""
_SHORTEST = 16
"""Tokens of a chat, at least."""


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    lora: dict[str, Any] | None = None

    def config(self) -> LlamaConfig:
        """transformers' config."""
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=131072,
            initializer_range=0.02,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters in the matrix products of all layers."""
        head_dim = self.hidden // self.heads
        attention = self.hidden * head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def useful_flops(self, tokens: int, trainable: int, squared_lengths: float) -> float:
        """Floating-point operations that training these tokens needs, whoever does it.

        Forward and backward of every matrix product at every real token (frozen weights need no gradient of their own:
        4 instead of 6 per parameter), the head at trained positions only, attention within documents, causally. No
        recomputation, no padding.
        """
        per_weight = 4 if self.lora else 6
        products = per_weight * (tokens * self.layer_parameters + trainable * self.hidden * self.vocab)
        attention = 6.0 * self.layers * self.hidden * squared_lengths  # 3 passes × 2 products × 2 / 2 (causal)
        return products + attention


_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512, tied=True),
    "24m": Shape(384, 12, 6, 2, 1024, 16384, tied=True),
    "135m": Shape(576, 30, 9, 3, 1536, 49152, tied=True),  # SmolLM2-135M
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, tied=True),  # Llama-3.2-1B
    "8b-lora": Shape(4096, 32, 32, 8, 14336, 128256, tied=False, lora=_LORA),  # Llama-3.1-8B
}


@dataclass(frozen=True)
class RowOptions:
    """What decides the rows."""

    vocab: int
    capacity: int
    steps: int
    accumulation: int
    masked: float = 0.6
    median: int = 250
    sigma: float = 1.0
    seed: int = 1


def prepare_model(name: str, folder: Path) -> Path:
    """A folder with weights and a tokenizer, made once."""
    shape, target = SHAPES[name], folder / f"model-{name}"
    if (target / "done").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    torch.manual_seed(WEIGHTS_SEED)
    dtype = torch.bfloat16 if shape.lora else torch.float32
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        LlamaForCausalLM(shape.config()).save_pretrained(target)
    finally:
        torch.set_default_dtype(previous)
    words = {"<end>": 0, **{f"w{index}": index for index in range(1, shape.vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(target)
    (target / "done").touch()
    return target


def chat_lengths(count: int, options: RowOptions, generator: np.random.Generator) -> Ints:
    """Lengths of chats: log-normal, redrawn where longer than a row or next to nothing; median 0: whole rows."""
    if options.median == 0:
        return np.full(count, options.capacity, np.int64)
    lengths = np.empty(0, np.int64)
    while len(lengths) < count:
        drawn = np.exp(generator.normal(np.log(options.median), options.sigma, 2 * count)).astype(np.int64)
        lengths = np.concatenate([lengths, drawn[(drawn >= _SHORTEST) & (drawn <= options.capacity)]])
    return lengths[:count]


def make_samples(options: RowOptions) -> list[TokenSample]:
    """Enough chats for the steps: Zipf-distributed ids, the prompt masked, `masked` of all tokens on average."""
    generator = np.random.default_rng(options.seed)
    needed = options.steps * options.accumulation * options.capacity
    lengths = chat_lengths(1 + needed // _SHORTEST, options, generator)
    lengths = lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), needed))]
    frequencies = 1.0 / np.arange(1, options.vocab)
    ids = 1 + generator.choice(options.vocab - 1, int(lengths.sum()), p=frequencies / frequencies.sum())
    samples = []
    for sample_ids in np.split(ids.astype(np.int32), np.cumsum(lengths)[:-1]):
        share = generator.beta(6 * options.masked, 6 * (1 - options.masked))
        labels = sample_ids.copy()
        labels[: min(max(1, round(share * len(labels))), len(labels) - 1)] = IGNORE_INDEX
        samples.append(TokenSample(sample_ids, labels))
    return samples


def prepare_rows(options: RowOptions, folder: Path) -> Path:
    """A folder with the token store and, for the peers, its samples and eft's planned rows as plain arrays."""
    size = f"{options.capacity}x{options.steps}x{options.accumulation}"
    target = folder / f"rows-{options.vocab}-{size}{'' if options.median else '-whole'}"
    wanted = {**asdict(options), "version": ROWS_VERSION}
    meta = target / "options.json"
    if meta.is_file() and json.loads(meta.read_text()) == wanted:
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    rows = ((f"row {index}", index, sample) for index, sample in enumerate(make_samples(options)))
    store = write_store(target / "store", (("chats", index, sample) for _, index, sample in rows))
    _export(store, options, target)
    meta.write_text(json.dumps(wanted))
    return target


def planned_bins(store: TokenStore, options: RowOptions) -> list[Any]:
    """The bins of eft's plan in the order of their steps: sample ids each."""
    plan = build_plan(
        store,
        capacity=options.capacity,
        packed=True,
        sequential=False,
        shuffle=True,
        global_batch_size=options.accumulation,
        num_epochs=1.0,
        max_steps=None,
        seed=42,
    )
    return [ids for step in range(plan.total_steps) for ids in plan.step(step).bins]


def _export(store: TokenStore, options: RowOptions, folder: Path) -> None:
    bins = planned_bins(store, options)
    samples = [store.sample(int(index)) for ids in bins for index in ids]
    lengths = np.array([len(sample.input_ids) for sample in samples])
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    labels = np.concatenate([sample.labels for sample in samples]).astype(np.int64)
    sample_ends = np.cumsum(lengths)
    np.save(folder / "sample_ids.npy", ids)
    np.save(folder / "sample_labels.npy", labels)
    np.save(folder / "sample_ends.npy", sample_ends)
    labels = labels.copy()
    labels[sample_ends - lengths] = IGNORE_INDEX  # a document's first token is nobody's target
    positions = np.arange(len(ids)) - np.repeat(sample_ends - lengths, lengths)
    row_ends = sample_ends[np.cumsum([len(bin_ids) for bin_ids in bins]) - 1]
    np.save(folder / "row_ids.npy", ids)
    np.save(folder / "row_labels.npy", labels)
    np.save(folder / "row_positions.npy", positions)
    np.save(folder / "row_ends.npy", row_ends)
    squares = np.add.reduceat(lengths.astype(np.float64) ** 2, np.cumsum([0, *map(len, bins[:-1])]))
    np.save(folder / "row_squares.npy", squares)


def mean_squares(folder: Path) -> float:
    """Σ len² of a row's documents, averaged over the rows."""
    return float(np.load(folder / "row_squares.npy").mean())


def store_of(folder: Path) -> TokenStore:
    """The token store of the rows."""
    return open_store(folder / "store")
