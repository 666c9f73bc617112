"""From the config to a stream: its sources, found and looked at; evaluation sets are prepared as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eft.config.data import DatasetConfig
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, DataError
from eft.core.hashing import hash_json
from eft.core.records import TokenSample
from eft.data.block_encoder import EncodedBlock, Job
from eft.data.block_set import BlockSet
from eft.data.encoded import EncodedRows
from eft.data.entry import Progress
from eft.data.gates_entry import GatedData, GatedEntry
from eft.data.ledger import Ledger
from eft.data.masking_code import masking_code
from eft.data.prepare import PreparedData, conversations_of, names_of, prepare_held_out, template_for
from eft.data.sample_set import DIGEST_DTYPE, Digests, TokenView
from eft.data.sources import size_hint
from eft.data.speed import num_processes, with_fast_tokenizer
from eft.data.stream import StreamDataset, WindowRule
from eft.data.stream_plan import StreamPlan, build_stream_plan
from eft.data.stream_source import StreamSource, without_held_out
from eft.data.tokenize import tokenizer_fingerprint

_HEAD_SAMPLES = 64
_EVERY_STREAM_READS = ("sequence_len", "excess_length_strategy", "min_sample_len", "malformed_rows")


def prepare_stream(cfg: TrainConfig, tokenizer: Any, *, progress: Progress | None = None) -> PreparedData:
    """The stream of `datasets`, and the prepared `test_datasets`, whose rows the stream leaves out.

    Reads the first block of each source, so that what is wrong with all rows is told before a model is loaded.
    Raises DataError as `prepare_datasets` does.
    """
    held_out = prepare_held_out(cfg, tokenizer, progress=progress)
    digests = [data.id_digests for data in held_out.evals.values()]
    forbidden: Digests = np.concatenate([np.zeros(0, DIGEST_DTYPE), *digests])
    names = names_of(cfg.datasets)
    shares = _shares(cfg.datasets)
    sources: list[StreamSource] = []
    head: list[TokenSample] = []
    gated: list[GatedEntry] = []
    for spec, name, share in zip(cfg.datasets, names, shares, strict=True):
        job, _ = with_fast_tokenizer(Job(spec, cfg, tokenizer, template_for(spec, cfg, tokenizer)))
        source = StreamSource(
            name=name,
            job=job,
            share=share,
            seed=cfg.seed,
            shuffle=cfg.shuffle_merged_datasets and not cfg.curriculum_sampling,
            num_processes=num_processes(job),
            held_out=forbidden,
        )
        first = source.head()
        _mark_keys(first, spec, cfg)
        head += _samples(first.rows)
        sources.append(source)
        rows, account = without_held_out(first, forbidden)
        if len(rows):
            title = f"{name} (its first block)"
            gated.append(GatedEntry(title, spec, cfg, BlockSet(rows), account, tokenizer, source.job.template))
    if not head:
        raise DataError(f"{cfg.datasets[0].path}: none of the first rows can be trained on")
    # All rows of a source may be held-out ones; then there is no view of them for the gates.
    shown = [entry.store for entry in gated]
    train = TokenView(shown, np.arange(sum(len(block) for block in shown))) if shown else None
    conversations, tools = conversations_of(held_out.evals)
    return PreparedData(
        train=StreamDataset(sources, _fingerprint(cfg, tokenizer, sources), head),
        evals=dict(held_out.evals),
        ledger=Ledger([*(source.start().account for source in sources), *held_out.accounts]),
        cache_note="\n".join([*(f"{spec.path}: tokenised while training" for spec in cfg.datasets), *held_out.notes]),
        eval_conversations=conversations,
        eval_tools=tools,
        gated=GatedData([*gated, *held_out.gated], train, dict(held_out.evals)),
    )


def plan_of_stream(cfg: TrainConfig, stream: StreamDataset, global_batch_size: int) -> StreamPlan:
    """The plan that a run of this config over `stream` follows."""
    rule = WindowRule.of(
        buffer_samples=cfg.streaming_multipack_buffer_size,
        capacity=cfg.sequence_len,
        packed=cfg.sample_packing,
        sequential=cfg.sample_packing_sequentially,
        strategy=cfg.sample_packing_strategy,
        bin_samples=cfg.sample_packing_bin_size,
        shuffle=not cfg.curriculum_sampling,
        seed=cfg.seed,
    )
    return build_stream_plan(
        stream,
        rule,
        global_batch_size=global_batch_size,
        max_steps=cfg.max_steps,
        token_budget=cfg.streaming_token_budget,
    )


def _shares(specs: list[DatasetConfig]) -> list[float]:
    """The part of the drawn tokens that each source has: its `token_share`, or by size and `weight` of what is left."""
    given = [spec.token_share for spec in specs]
    left = 1.0 - sum(share for share in given if share is not None)
    sizes = [
        0.0 if share is not None else max(1, size_hint(spec)) * spec.weight
        for spec, share in zip(specs, given, strict=True)
    ]
    whole = sum(sizes) or 1.0
    shares = [left * size / whole if share is None else share for share, size in zip(given, sizes, strict=True)]
    for spec, share in zip(specs, shares, strict=True):
        if share <= 0:
            raise ConfigError(f"datasets: nothing is left for {spec.path}: the `token_share`s of the others come to 1")
    return shares


def _mark_keys(first: EncodedBlock, spec: DatasetConfig, cfg: TrainConfig) -> None:
    """The block's encoder read these keys of its own copies (E8)."""
    for name in first.tally.spec_keys:
        getattr(spec, name)
    for name in (*first.tally.cfg_keys, *_EVERY_STREAM_READS, "dataset_processes"):
        getattr(cfg, name)


def _samples(rows: EncodedRows) -> list[TokenSample]:
    samples, start = [], 0
    for length in rows.columns["lengths"][:_HEAD_SAMPLES].tolist():
        samples.append(TokenSample(rows.ids[start : start + length], rows.labels[start : start + length]))
        start += length
    return samples


def _fingerprint(cfg: TrainConfig, tokenizer: Any, sources: list[StreamSource]) -> str:
    """Of what decides the samples of a stream. Of the files it has names and sizes: their bytes are not read."""
    specs = [source.job.spec.model_dump(mode="json", exclude={"path"}) for source in sources]
    options = cfg.model_dump(mode="json", include={*_EVERY_STREAM_READS, "train_on_inputs", "eot_tokens"})
    return hash_json(
        {
            "code": masking_code(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "sources": [[_file_facts(part.name) for part in source.parts] for source in sources],
            "specs": specs,
            "templates": [source.job.template for source in sources],
            "options": options,
            "shares": [source.share for source in sources],
            "held out": hash_json([source.held_out.tolist() for source in sources[:1]]),
        }
    )


def _file_facts(name: str) -> list[Any]:
    path = Path(name)
    return [path.name, path.stat().st_size if path.is_file() else None]
