"""Everything a checkpoint holds, together (E3): weights, optimizer, schedule, generators; dropout on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eft.config.optim import OptimConfig
from eft.core.errors import ConfigError
from eft.optim.optimizers import OPTIMIZERS, build_optimizer, check_optimizer
from eft.optim.schedulers import build_scheduler
from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.optimizer_state import load_scheduler, save_optimizer, save_scheduler
from eft.runtime.rng import load_rng, save_rng, seed_everything
from eft.runtime.weights import save_weights
from tests.tiny_models import tiny_model

TOTAL, CUT = 6, 3

# peft 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Run:
    """A minimal training: model with dropout, optimizer, schedule."""

    def __init__(self, optimizer: str, adapter: bool, schedule: str) -> None:
        seed_everything(7)
        self.cfg = OptimConfig(learning_rate=0.01, optimizer=optimizer, weight_decay=0.1, lr_scheduler=schedule)
        self.model: Any = tiny_model("llama").train()
        if adapter:
            self.model = get_peft_model(
                self.model, LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
            )
        else:
            for layer in self.model.model.layers:
                layer.self_attn.attention_dropout = 0.3
        self.optimizer = build_optimizer(self.cfg, self.model)
        self.scheduler = build_scheduler(self.cfg, self.optimizer, TOTAL)
        self.log: list[tuple[float, float, float]] = []

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            ids = (torch.arange(12) * (step + 1) % 100).unsqueeze(0)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.log.append((loss.item(), norm.item(), self.optimizer.param_groups[0]["lr"]))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, store: CheckpointStore, step: int) -> None:
        with store.write(step) as folder:
            assert folder is not None
            save_weights(folder, self.model)
            save_optimizer(folder, self.optimizer, self.model)
            save_scheduler(folder, self.scheduler)
            save_rng(folder)

    def load(self, folder: Path, store: CheckpointStore) -> None:
        store.load_weights(folder, self.model)
        store.load_optimizer(folder, self.model, self.optimizer)
        load_scheduler(folder, self.scheduler)
        assert load_rng(folder)

    def weights(self) -> dict[str, bytes]:
        return {name: value.numpy().tobytes() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_the_straight_one(optimizer: str, adapter: bool, tmp_path: Path) -> None:
    try:
        check_optimizer(OptimConfig(learning_rate=0.01, optimizer=optimizer), "cpu")
    except ConfigError as error:
        pytest.skip(str(error))  # another device, or a package that is not installed
    if optimizer == "muon" and adapter:
        pytest.skip("Muon leaves adapter factors alone")
    store = CheckpointStore(tmp_path, save_total_limit=2)
    schedule = "cosine" if not optimizer.startswith("schedule_free") else "constant_with_warmup"
    straight = Run(optimizer, adapter, schedule)
    straight.steps(0, CUT)
    straight.save(store, CUT)  # saving disturbs nothing: it goes on from here
    straight.steps(CUT, TOTAL)

    resumed = Run(optimizer, adapter, schedule)
    found = store.newest_complete().path
    assert found is not None
    resumed.load(found, store)
    resumed.steps(CUT, TOTAL)

    assert resumed.log == straight.log[CUT:]
    assert resumed.weights() == straight.weights()
    assert {path.suffix for path in found.iterdir()} == {".json", ".safetensors"}
    untouched = Run(optimizer, adapter, schedule)
    untouched.steps(0, TOTAL)
    assert untouched.log == straight.log


def test_the_dropout_of_this_test_matters() -> None:
    first, second = Run("sgd", True, "constant"), Run("sgd", True, "constant")
    seed_everything(1)
    first.steps(0, 2)
    seed_everything(2)
    second.steps(0, 2)
    assert first.log != second.log
