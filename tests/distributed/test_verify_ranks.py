"""`eft verify --nproc 2`: a global batch on two processes is that of one; a wrong share is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eft.config.load import config_from_mapping
from eft.core.records import PromiseResult
from eft.data.dataset_meta import DatasetMeta
from eft.data.store import as_token_dataset
from eft.inputs import load_trainable_model, plan_of
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import exact_arithmetic
from eft.verify.ranks import check_ranks
from eft.verify.ranks_resume import check_resume_over_ranks
from eft.verify.rehearsal import STEPS, STOP
from eft.verify.verification import Verification
from tests.distributed.commands import start, write_run
from tests.distributed.ranks import Ranks
from tests.functional.reference import token_rows

LORA = {"adapter": "lora", "lora_target_linear": True, "lora_dropout": 0.1}


class OwnCount(EftTrainer):
    """The classical fault: a process divides by the tokens of its own share."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> float | None:
        return float(sum(batch["num_trained"] for batch in batch_samples)) * self.parts.parallel.gradient_ranks


class ForgetsGenerators(EftTrainer):
    """A fault: a continued run drops other elements than the straight one."""

    def _load_rng_state(self, checkpoint: str | None) -> None: ...


class TakesOldRows(EftTrainer):
    """A fault: the first process of a continued run is one step behind."""

    def get_train_dataloader(self) -> Any:
        def cursor() -> int:
            step = int(self.state.global_step)
            return step - 1 if self.args.process_index == 0 and step else step

        return self.parts.packing.train_loader(self.plan, cursor)


def verification_of(folder: Path, model: Path, tokenizer: Any, **keys: Any) -> Verification:
    values = {
        "base_model": str(model),
        "datasets": [{"path": "given"}],
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "sample_packing": True,
        "global_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        **keys,
    }
    config = config_from_mapping(values)
    dataset = as_token_dataset(token_rows(14))
    again = partial(load_trainable_model, config, tokenizer)
    plan = plan_of(config, dataset, 1)
    meta = DatasetMeta(dataset, None, plan.total_steps)
    return Verification(config, folder, tokenizer, meta, again(), plan, load_model=again)


def start_in(two: Ranks) -> Callable[[Callable[..., None], tuple[Any, ...], int], None]:
    """What runs the checks' processes: the ones that are there."""

    def begin(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
        assert count == two.world_size
        two.run(work, *arguments)

    return begin


def check(
    two: Ranks, folder: Path, model: Path, tokenizer: Any, trainer_class: type[EftTrainer], **keys: Any
) -> PromiseResult:
    verification = verification_of(folder, model, tokenizer, **keys)
    with exact_arithmetic(verification.model):
        return check_ranks(verification, 2, trainer_class, start_in(two))


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_a_batch_of_two_processes_is_that_of_one(
    keys: dict[str, Any], two: Ranks, tmp_path: Path, model_folder: Callable[[str], Path], tokenizer: Any
) -> None:
    result = check(two, tmp_path, model_folder("llama"), tokenizer, EftTrainer, **keys)
    assert result.status == "pass", result
    assert result.numbers["gradients"] < 1e-6


def test_a_share_that_is_weighted_wrongly_is_found(
    two: Ranks, tmp_path: Path, model_folder: Callable[[str], Path], tokenizer: Any
) -> None:
    result = check(two, tmp_path, model_folder("llama"), tokenizer, OwnCount)
    assert result.status == "fail"
    assert "gradients differ by" in result.detail


TWO_BINS = {"micro_batch_size": 2, "global_batch_size": 4}


@pytest.mark.parametrize("keys", [LORA, *(pytest.param(k, marks=pytest.mark.slow) for k in ({}, TWO_BINS))], ids=str)
def test_a_run_of_two_processes_is_continued_by_two_and_by_one(
    keys: dict[str, Any], two: Ranks, tmp_path: Path, model_folder: Callable[[str], Path], tokenizer: Any
) -> None:
    verification = verification_of(tmp_path, model_folder("llama"), tokenizer, **keys)
    same, fewer = check_resume_over_ranks(verification, 2, EftTrainer, start_in(two))
    assert same.status == "pass", same.detail
    assert "bit-equal" in same.detail
    assert same.numbers["states"] > 20
    assert fewer.status == "pass", fewer.detail
    assert fewer.numbers["steps"] == STEPS - STOP
    assert fewer.numbers["gradients"] < 1e-9
    assert fewer.numbers["loss"] < 1e-6


@pytest.mark.parametrize(
    ("fault", "statuses", "words"),
    [
        (ForgetsGenerators, ("fail", "pass"), "generator"),
        (OwnCount, ("pass", "fail"), "loss of step"),
        pytest.param(TakesOldRows, ("fail", "pass"), "other micro-batches", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_continued_wrongly_is_found(
    fault: type[EftTrainer],
    statuses: tuple[str, str],
    words: str,
    two: Ranks,
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    tokenizer: Any,
) -> None:
    verification = verification_of(tmp_path, model_folder("llama"), tokenizer, **LORA)
    results = check_resume_over_ranks(verification, 2, fault, start_in(two))
    assert tuple(result.status for result in results) == statuses
    assert any(words in result.detail for result in results), [result.detail for result in results]


@pytest.mark.slow
def test_the_command_starts_the_processes(tmp_path: Path) -> None:
    code, text = start("verify", write_run(tmp_path), "--nproc", 2, "--json").end()
    assert code == 0, text
    results = json.loads(text[text.index("[\n") :])
    ranks = [result["status"] for result in results if "2 processes" in result["title"]]
    assert ranks == ["pass"] * 3
