"""E1 through the builder's own parts: in a packed row each document gets what it gets alone, and sees no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eft.core.errors import ModelError
from eft.core.records import TokenSample
from eft.data.store import as_token_dataset
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeTrainer
from tests.functional.reference import (
    MODELS,
    Row,
    assert_gradients_equal,
    gradients_of,
    model_of,
    plain_step,
    token_rows,
)
from tests.tiny_models import VOCAB_SIZE

FAMILIES = (
    *MODELS,
    *("qwen2", "qwen3_moe", "mixtral", "gemma2", "phi3", "olmo2", "gpt_neox", "smollm3", "granite", "cohere2"),
    *("deepseek_v3", "gpt_oss", "llama4_text"),
)
WITH_EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


def samples(rows: list[Row]) -> list[TokenSample]:
    dataset = as_token_dataset(rows)
    return [dataset.sample(index) for index in range(len(dataset))]


def packed_logits(trainer: EftTrainer, rows: list[Row]) -> list[Tensor]:
    """Logits [tokens, vocab] of each row, by the trainer's forward over one packed row of all of them."""
    batch = trainer.parts.packing.collator([samples(rows)])
    everywhere = {**batch, "trained_positions": torch.arange(batch["input_ids"].shape[1])}
    logits = trainer.parts.forward(trainer.model, everywhere)
    return list(logits.split([len(row["input_ids"]) for row in rows]))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_documents_alone(name: str, make_trainer: MakeTrainer) -> None:
    rows = token_rows(6, longest=25)
    trainer = make_trainer(rows, model=model_of(name), sequence_len=256)
    stock = model_of(name)

    alone = [stock(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows]
    packed = packed_logits(trainer, rows)
    scale = torch.cat(alone).abs().max()
    for ours, theirs in zip(packed, alone, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * scale

    batch = trainer.parts.packing.collator([samples(rows)])
    loss = trainer.parts.loss(trainer.model, batch) / batch["num_trained"]
    loss.backward()
    expected_loss, expected = plain_step(stock, rows)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients_of(trainer.model), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_document_sees_another(name: str, make_trainer: MakeTrainer) -> None:
    rows = token_rows(5, longest=25, seed=3)
    trainer = make_trainer(rows, model=model_of(name), sequence_len=256)
    changed: list[Row] = [dict(row) for row in rows]
    ids = [(token + 1) % VOCAB_SIZE for token in rows[2]["input_ids"]]
    labels = [label if label == -100 else token for token, label in zip(ids, rows[2]["labels"], strict=True)]
    changed[2] = {**rows[2], "input_ids": ids, "labels": labels}
    before, after = packed_logits(trainer, rows), packed_logits(trainer, changed)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        change = (new - old).abs().max().item()
        # Expert products change shape with the routing of other documents, and their rounding with it.
        leak = 1e-6 * old.abs().max().item() if name in WITH_EXPERTS else 0.0
        assert change > 0.01 if number == 2 else change <= leak, f"document {number}"


def test_one_row_holds_several_documents(make_trainer: MakeTrainer) -> None:
    """The tests above would prove little if the plan never packed."""
    rows = token_rows(12)
    trainer: Any = make_trainer(rows, sequence_len=64)
    bins = [ids for step in range(trainer.make_plan().total_steps) for ids in trainer.plan.step(step).bins]
    assert sum(len(ids) for ids in bins) == len(rows)
    assert max(len(ids) for ids in bins) >= 3
    assert len(bins) <= 5


def test_the_probe_of_a_foreign_model_is_on_record(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(model=model_of("foreign peft"))
    promise = next(result for result in trainer.outcome.promises if result.promise == "E1")
    assert promise.status == "pass"
    assert promise.numbers["leak"] == 0.0
    assert trainer.parts.forward.support.mode == "native"


@pytest.mark.parametrize("name", ["mamba2", "bloom"])
def test_a_family_that_cannot_be_packed_trains_unpacked_rows(name: str, make_trainer: MakeTrainer) -> None:
    """Refused by name where packing is asked for; without it two rows of uneven length give the plain step."""
    rows = token_rows(2, longest=25, seed=5)
    with pytest.raises(ModelError, match="cannot keep packed documents apart"):
        make_trainer(rows, model=model_of(name))
    trainer = make_trainer(rows, model=model_of(name), sample_packing=False, micro_batch_size=2)
    assert trainer.parts.forward.support.mode == "refused"
    batch = trainer.parts.packing.collator([[sample] for sample in samples(rows)])
    loss = trainer.parts.loss(trainer.model, batch) / batch["num_trained"]
    loss.backward()
    expected_loss, expected = plain_step(model_of(name), rows)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients_of(trainer.model), expected)
