"""E5 through a run: every raw token has its place in the ledger, every sample is trained exactly once per epoch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from eft import inputs, run
from eft.data.ledger import Ledger
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import record_samples, token_rows
from tests.tiny_models import tiny_model


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [chat(f"question {number} " * (1 + number % 4), "yes no " * (1 + number % 5)) for number in range(13)]
LONG = chat("long", "very long " * 60)
SHORT = chat("a", "b")
UNTRAINED = {"messages": [{"role": "user", "content": "is anybody there, hello, hello?"}]}
BROKEN = {"messages": [{"role": "user"}, {"role": "assistant", "content": "no question"}]}
HELD_OUT = [GOOD[2], chat("held out only", "yes, held out"), chat("another one", "held out too")]


@pytest.fixture
def mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Config keys of a training file with everything that can go wrong with a row, and a held-out file."""
    too_short = count(tokenizer, SHORT)
    assert too_short < min(count(tokenizer, row) for row in GOOD)
    rows = [*GOOD, LONG, SHORT, UNTRAINED, GOOD[0], GOOD[5], GOOD[0]]
    lines = [json.dumps(row) for row in rows]
    lines[4:4] = [json.dumps(BROKEN), '{"messages": [']
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    return {
        "datasets": [{"path": str(tmp_path / "mixed.jsonl"), "type": "chat_template"}],
        "test_datasets": [{"path": str(tmp_path / "test.jsonl"), "type": "chat_template"}],
        "malformed_rows": "drop",
        "min_sample_len": too_short + 1,
        "dataset_exact_deduplication": True,
        "sequence_len": 96,
    }


def count(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> int:
    return len(tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False)).input_ids)


def test_the_ledger_of_a_mixed_file_balances(
    mixed: dict[str, Any], make_config: MakeConfig, make_trainer: MakeTrainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = make_config(**mixed, num_epochs=2)
    meta = inputs.load_datasets(config)
    assert meta.ledger is not None
    meta.ledger.check()
    (train,), (held_out,) = meta.ledger.of("train"), meta.ledger.of("eval")
    dropped = {reason: portion.rows for reason, portion in train.dropped.items()}
    assert dropped == {
        "malformed": 2,
        "too_long": 1,
        "too_short": 1,
        "no_trainable_tokens": 1,
        "duplicate": 3,
        "held_out_duplicate": 1,
    }
    assert train.rows == len(GOOD) + 3 + 3 + 2
    assert train.samples == len(GOOD) - 1
    kept = [row for row in GOOD if row is not GOOD[2]]
    assert train.trainable + train.context == sum(count(tokenizer, row) for row in kept)
    read = [*GOOD, LONG, SHORT, UNTRAINED, GOOD[0], GOOD[5], GOOD[0]]
    assert train.raw == sum(count(tokenizer, row) for row in read)
    assert train.dropped["too_long"].tokens == count(tokenizer, LONG) > config.sequence_len
    assert train.dropped["held_out_duplicate"].tokens == count(tokenizer, GOOD[2])
    assert "mixed.jsonl" in train.dropped["malformed"].first_rows[0]
    assert "5" in train.dropped["malformed"].first_rows[0]
    assert held_out.samples == held_out.rows == len(HELD_OUT)

    # What was promised is what a run of two epochs went through.
    model = tiny_model("llama", vocab_size=len(tokenizer))
    trainer = make_trainer(meta.train_dataset, meta.eval_dataset, model=model, config=config)
    trainer.train()
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["tokens"] == 2 * (train.trainable + train.context)
    assert last["trained_tokens"] == 2 * train.trainable


def test_truncation_is_on_the_ledger_too(
    mixed: dict[str, Any], make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    meta = inputs.load_datasets(make_config(**mixed, excess_length_strategy="truncate"))
    assert meta.ledger is not None
    meta.ledger.check()
    (train,) = meta.ledger.of("train")
    assert train.truncated_rows == 1
    assert train.truncated == count(tokenizer, LONG) - 96
    assert train.samples == len(GOOD)


def test_a_run_writes_the_ledger_it_trained_on(mixed: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    _, _, trainer = run.train(make_config(**mixed))
    ledger = Ledger.from_json(json.loads((tmp_path / "out" / "ledger.json").read_text()))
    ledger.check()
    (train,) = ledger.of("train")
    assert trainer.totals["tokens"] == train.trainable + train.context
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert {promise["status"] for promise in promises if promise["promise"] == "E5"} == {"pass"}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("rows", [11, 13])
def test_every_sample_once_per_epoch(
    rows: int, micro_batch_size: int, accumulation: int, packed: bool, make_trainer: MakeTrainer
) -> None:
    """Neither number divides by anything: the last step of an epoch is short, its micro-batches uneven or dummies."""
    samples = token_rows(rows)
    trainer: EftTrainer = make_trainer(
        samples,
        sample_packing=packed,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_epochs=2,
        save_strategy="no",
    )
    recorder = record_samples(trainer, samples)
    trainer.train()
    steps = recorder.steps(accumulation)
    assert len(steps) == trainer.state.global_step
    first, second = trainer.make_plan().epoch_ends
    for epoch in (steps[:first], steps[first:second]):
        assert sorted(sum(epoch, [])) == list(range(rows))
    cut = first * accumulation
    orders = [sum(part, []) for part in (recorder.micro_batches[:cut], recorder.micro_batches[cut:])]
    assert orders[0] != orders[1], "each epoch has an order of its own"


def test_a_part_of_an_epoch_repeats_nothing(make_trainer: MakeTrainer) -> None:
    samples = token_rows(13)
    trainer = make_trainer(samples, sample_packing=False, num_epochs=1.5, save_strategy="no")
    recorder = record_samples(trainer, samples)
    trainer.train()
    seen = Counter(sum(recorder.micro_batches, []))
    # 7 steps, then 4 of 7 with two rows each.
    assert sum(seen.values()) == 13 + 8
    assert set(seen.values()) == {1, 2}


@pytest.mark.parametrize("keys", [{}, {"eval_batch_size": 3}, {"eval_sample_packing": False, "eval_batch_size": 2}])
def test_every_held_out_sample_once_per_evaluation(keys: dict[str, Any], make_trainer: MakeTrainer) -> None:
    held_out = token_rows(7, seed=9)
    trainer = make_trainer(evals=held_out, val_set_size=0.1, **keys)
    recorder = record_samples(trainer, held_out)
    for _ in range(2):
        recorder.micro_batches.clear()
        trainer.evaluate()
        assert sum(recorder.micro_batches, []) == list(range(7))
