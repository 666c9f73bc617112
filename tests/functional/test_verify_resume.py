"""`eft verify` and E3: what a resume must bring back is compared bit by bit, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eft.config.load import config_from_mapping
from eft.core.records import PromiseResult
from eft.data.batches import BatchSource
from eft.data.dataset_meta import DatasetMeta
from eft.data.plan import build_plan
from eft.data.store import as_token_dataset
from eft.models.adapters import apply_adapter
from eft.runtime import checkpoint as checkpoints
from eft.trainer.rng import RngLoaderMixin
from eft.verify import promises
from eft.verify.rehearsal import STOP, check_resume, rehearse
from eft.verify.resume import compare_traces
from eft.verify.verification import Verification
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model

LORA = {"adapter": "lora", "lora_r": 2, "lora_target_linear": True, "lora_dropout": 0.1}


def verification_of(tmp_path: Path, tokenizer: Any, *, in_memory: bool = False, **keys: Any) -> Verification:
    """Made of parts; the model with dropout, made anew where E3 asks for it, unless it is `in_memory`."""
    values = {
        "base_model": "in memory",
        "datasets": [{"path": "rows.jsonl"}],
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 64,
        "sample_packing": True,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
    }
    config = config_from_mapping({**values, **keys})
    dataset = as_token_dataset(token_rows(14))
    plan = build_plan(
        dataset,
        capacity=64,
        packed=True,
        sequential=False,
        shuffle=True,
        global_batch_size=2,
        num_epochs=1,
        max_steps=None,
        seed=0,
    )

    def load() -> Any:
        return apply_adapter(tiny_model("llama", attention_dropout=0.1), config, seed=config.seed)

    meta = DatasetMeta(dataset, None, plan.total_steps)
    again = None if in_memory else load
    return Verification(config, tmp_path / "work", tokenizer, meta, load(), plan, load_model=again)


def resume(verification: Verification) -> PromiseResult:
    rehearsal = rehearse(verification)
    assert rehearsal.error is None
    return check_resume(verification, rehearsal)


@pytest.mark.parametrize("keys", [{}, LORA, {"save_only_model": True, "in_memory": True}], ids=str)
def test_a_resumed_rehearsal_is_the_straight_one(keys: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    verification = verification_of(tmp_path, tokenizer, **keys)
    model = verification.model
    result = resume(verification)
    assert result.status == "pass", result.detail
    assert result.numbers["micro_batches"] == 2 * STOP
    assert result.numbers["states"] > 20
    assert (verification.model is model) == ("in_memory" in keys)
    assert f"after step {STOP}" in result.title


def forget_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RngLoaderMixin, "_load_rng_state", lambda self, checkpoint: None)


def lose_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoints.load_optimizer

    def lossy(folder: Path, optimizer: Any, model: Any, **options: Any) -> None:
        load(folder, optimizer, model, **options)
        next(iter(optimizer.state.values()))["exp_avg_sq"].zero_()

    monkeypatch.setattr(checkpoints, "load_optimizer", lossy)


def start_a_step_early(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = BatchSource.train_loader

    def early(self: BatchSource, plan: Any, cursor: Callable[[], int]) -> Any:
        return loader(self, plan, lambda: max(0, cursor() - 1))

    monkeypatch.setattr(BatchSource, "train_loader", early)


def swap_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoints.load_weights

    def swapped(folder: Path, model: Any, *arguments: Any) -> None:
        load(folder, model, *arguments)
        first, second = (model.get_parameter(f"model.layers.{layer}.self_attn.q_proj.weight") for layer in (0, 1))
        with torch.no_grad():
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)

    monkeypatch.setattr(checkpoints, "load_weights", swapped)


FAULTS = {
    forget_generators: "generator",
    lose_a_moment: "optimizer ",
    start_a_step_early: "other micro-batches",
    swap_two_weights: "loss of step 3",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_broken_resume_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command's own list of checks, of which only E3 is looked at; a failed one is exit code 1."""
    plant(monkeypatch)
    verification = verification_of(tmp_path, tokenizer)
    rehearsal = rehearse(verification)
    result = promises._guarded("E3", "resume", lambda: [check_resume(verification, rehearsal)])[0]
    assert (result.promise, result.status) == ("E3", "fail")
    assert FAULTS[plant] in result.detail


def test_where_kernels_do_not_repeat_their_bits_losses_may_differ_a_little(tmp_path: Path, tokenizer: Any) -> None:
    verification = verification_of(tmp_path, tokenizer)
    rehearsal = rehearse(verification)
    trace = rehearsal.trace
    assert trace is not None
    rows = [{**row, "loss": row["loss"] * (1 + 1e-4)} for row in trace.rows]
    state = {name: value + "'" if name.startswith("weights") else value for name, value in trace.state.items()}
    other = replace(trace, rows=rows, state=state, fed=trace.fed[2 * STOP :])
    assert compare_traces(trace, other, stopped_after=STOP, to_the_bit=True).status == "fail"
    assert compare_traces(trace, other, stopped_after=STOP, to_the_bit=False).status == "pass"
    far = replace(other, rows=[{**row, "loss": row["loss"] * 1.1} for row in rows])
    assert compare_traces(trace, far, stopped_after=STOP, to_the_bit=False).status == "fail"
    shifted = replace(other, rows=[{**row, "learning_rate": row["learning_rate"] * (1 + 1e-9)} for row in rows])
    assert compare_traces(trace, shifted, stopped_after=STOP, to_the_bit=False).status == "fail"
