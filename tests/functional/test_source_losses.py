"""The loss of each data set: its own mean, exact, and all of them together the loss of the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eft import run
from eft.data.sample_set import TokenView
from eft.data.store import TokenStore, write_store
from eft.loss.head import trainable_token_loss
from eft.loss.linear import head_loss
from eft.report.curves import run_charts
from eft.report.reading import read_run
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows
from tests.functional.test_host_path import Window
from tests.functional.test_streaming import STREAM
from tests.tiny_models import tiny_model

NAMES = ("books", "chat", "code")


def store_of(folder: Path, seed: int, count: int, weighted: bool) -> TokenStore:
    rows = token_rows(count, seed=seed)
    samples = []
    for number, row in enumerate(rows):
        ids, labels = np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32)
        weights = np.linspace(0.5, 2, len(ids), dtype=np.float32) if weighted else None
        samples.append(("rows", number, run_sample(ids, labels, weights)))
    return write_store(folder, samples)


def run_sample(ids: Any, labels: Any, weights: Any) -> Any:
    from eft.core.records import TokenSample

    return TokenSample(ids, labels, weights)


@pytest.fixture
def mixture(tmp_path: Path) -> TokenView:
    stores = [store_of(tmp_path / name, seed, 7, name == "code") for seed, name in enumerate(NAMES)]
    order = np.random.default_rng(0).permutation(21)
    return TokenView(stores, order, NAMES)


def logged(trainer: EftTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def by_hand(trainer: EftTrainer, mixture: TokenView) -> list[dict[str, list[float]]]:
    """Σ weight · NLL and Σ weight of each data set in each step, sample by sample, with the untrained model."""
    model = tiny_model("llama").double()
    steps = []
    for number in range(trainer.plan.total_steps):
        sums = {name: [0.0, 0.0] for name in NAMES}
        for index in np.concatenate(trainer.plan.step(number).bins).tolist():
            sample = mixture.sample(index)
            ids = torch.tensor(sample.input_ids[None].astype(np.int64))
            labels = torch.tensor(sample.labels.astype(np.int64))
            weights = torch.ones(len(labels)) if sample.weights is None else torch.tensor(sample.weights)
            with torch.no_grad():
                nll = -model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            trained = labels[1:] != -100
            rows = nll[trained].gather(1, labels[1:][trained][:, None])[:, 0] * weights[1:][trained]
            mine = sums[NAMES[mixture.groups()[index]]]
            mine[0] += float(rows.sum())
            mine[1] += float(weights[1:][trained].double().sum())
        steps.append(sums)
    return steps


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_accumulation_steps": 1, "micro_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"sample_packing": False, "micro_batch_size": 2},
    ],
)
def test_each_data_set_has_its_own_mean_and_they_make_up_the_loss(
    mixture: TokenView, make_trainer: MakeTrainer, keys: dict[str, Any]
) -> None:
    trainer = make_trainer(mixture, learning_rate=1e-7, logging_steps=1, save_strategy="no", **keys)
    rows = logged(trainer)
    expected = by_hand(trainer, mixture)
    assert len(rows) == len(expected)
    for row, sums in zip(rows, expected, strict=True):
        whole = sum(weight for _, weight in sums.values())
        total = 0.0
        for name, (nll, weight) in sums.items():
            if weight == 0:
                assert f"loss/{name}" not in row
                continue
            assert row[f"loss/{name}"] == pytest.approx(nll / weight, rel=3e-5)
            assert row[f"share/{name}"] == pytest.approx(weight / whole, rel=1e-6)
            total += row[f"loss/{name}"] * row[f"share/{name}"]
        assert total == pytest.approx(row["loss"], rel=1e-6)


def test_a_logging_window_is_the_mean_over_its_tokens(mixture: TokenView, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(mixture, learning_rate=1e-7, logging_steps=3, save_strategy="no")
    rows = logged(trainer)
    expected = by_hand(trainer, mixture)
    window = expected[1:3]  # the first step is logged by itself
    for name in NAMES:
        nll, weight = (sum(step[name][part] for step in window) for part in (0, 1))
        assert rows[1][f"loss/{name}"] == pytest.approx(nll / weight, rel=3e-5)


def test_a_run_over_one_data_set_logs_none(make_trainer: MakeTrainer) -> None:
    rows = logged(make_trainer(save_strategy="no"))
    assert not any("/" in name for row in rows for name in row)


def test_sums_by_data_set_wait_for_no_device(mixture: TokenView, make_trainer: MakeTrainer) -> None:
    """What is read back between two logged steps is what a run over one data set reads."""
    counts = []
    for rows in (mixture, TokenView(mixture.bases, mixture.positions)):
        trainer = make_trainer(rows, max_steps=9, logging_steps=9, save_strategy="no")
        window = Window(4, 8)
        trainer.add_callback(window)
        trainer.train()
        counts.append(window.reads.counts)
    assert counts[0] == counts[1]


def test_held_out_samples_by_data_set(mixture: TokenView, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(mixture, mixture.select(range(9)), learning_rate=1e-7, test_datasets=[{"path": "x"}])
    trainer.make_plan()
    metrics = trainer.evaluate()
    view = mixture.select(range(9))
    weights = np.bincount(view.groups(), view.weight_sums, minlength=3)
    total = sum(metrics[f"eval_loss/{name}"] * weight for name, weight in zip(NAMES, weights, strict=True) if weight)
    assert total / weights.sum() == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_named_held_out_sets(make_trainer: MakeTrainer) -> None:
    evals = {"one": token_rows(4, seed=3), "two": token_rows(5, seed=4)}
    trainer = make_trainer(None, evals, test_datasets=[{"path": "x"}, {"path": "y"}])
    trainer.make_plan()
    metrics = trainer.evaluate()
    assert metrics["eval_loss/one"] == metrics["eval_one_loss"]
    assert metrics["eval_loss/two"] == metrics["eval_two_loss"]


def test_names_come_from_the_config(make_config: MakeConfig, rows_file: Path, tmp_path: Path) -> None:
    lines = rows_file.read_text().splitlines(keepends=True)
    datasets = []
    for name, part in (("left", lines[:12]), ("right", lines[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        datasets.append({"path": str(tmp_path / f"{name}.jsonl"), "type": "chat_template"})
    run.train(make_config(datasets=datasets, val_set_size=0.3, logging_steps=1, save_strategy="no"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/left" in row and "loss/right" in row for row in rows)
    assert any("eval_loss/left" in row and "eval_loss/right" in row for row in rows)
    (chart,) = [chart for chart in run_charts(read_run(tmp_path / "out")) if chart.identifier == "loss-by-data-set"]
    assert {series.label for series in chart.series} == {"left", "right"}


def test_a_stream_of_several_sources_too(make_config: MakeConfig, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(rows_file.read_text())
    datasets = [{"path": str(path), "type": "chat_template"} for path in (rows_file, tmp_path / "other.jsonl")]
    run.train(make_config(datasets=datasets, **{**STREAM, "logging_steps": 1}))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        parts = [row[f"loss/{name}"] * row[f"share/{name}"] for name in ("rows", "other") if f"loss/{name}" in row]
        assert sum(parts) == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_head", ["linear", "module", "logits"])
def test_sums_of_groups_add_up_and_change_nothing(weighted: bool, with_head: str, monkeypatch: Any) -> None:
    import eft.loss.linear as linear
    import eft.loss.objectives as objectives

    monkeypatch.setattr(linear, "CHUNK_BYTES", 4 * 50 * 11)  # several chunks, of several blocks
    monkeypatch.setattr(objectives, "_BLOCK_ELEMENTS_CPU", 3 * 50)
    torch.manual_seed(0)
    hidden = torch.randn(31, 8, requires_grad=True)
    targets, members = torch.randint(0, 50, (31,)), torch.randint(0, 3, (31,))
    weights = torch.rand(31) if weighted else None
    head: torch.nn.Module = torch.nn.Linear(8, 50, bias=False)
    if with_head == "module":
        head = torch.nn.Sequential(head)

    def loss(groups: Any) -> torch.Tensor:
        if with_head == "logits":
            return trainable_token_loss(head(hidden), targets, weights, groups=groups)
        return head_loss(hidden, head, targets, weights, groups=groups)

    totals = torch.zeros(3, dtype=torch.float64)
    with_groups, plain = loss((members, totals)), loss(None)
    assert torch.equal(with_groups, plain)
    assert float(totals.sum()) == pytest.approx(float(plain.detach()), rel=1e-6)
    rows = -head(hidden).log_softmax(-1)[torch.arange(31), targets] * (1 if weights is None else weights)
    for group in range(3):
        assert float(totals[group]) == pytest.approx(float(rows[members == group].detach().sum()), rel=3e-5)
    (first,), (second,) = (torch.autograd.grad(each, hidden) for each in (with_groups, plain))
    assert torch.equal(first, second)
