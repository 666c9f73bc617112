"""Plans and loaders of one run: what the trainer asks for, made of `plan`, `collators` and `loader`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from eft.core.records import TokenDataset
from eft.data.collators import Collator
from eft.data.loader import build_eval_loader, build_train_loader
from eft.data.plan import Plan, build_eval_plan, build_plan
from eft.data.store import as_token_dataset


@dataclass(frozen=True)
class BatchSource:
    """Everything that decides which tokens are in which micro-batch of which rank."""

    collator: Collator
    capacity: int
    """Longest bin, in tokens."""
    packed: bool
    eval_packed: bool
    sequential: bool
    shuffle: bool
    seed: int
    num_epochs: float
    max_steps: int | None
    global_batch_size: int
    accumulation: int
    micro_batch_size: int
    eval_batch_size: int
    rank: int
    world_size: int
    num_workers: int
    pin_memory: bool
    attention_cost_ratio: float
    """k in cost(bin) = tokens + k · Σ length²."""

    def make_plan(self, dataset: Any, total_num_steps: int | None) -> Plan:
        """The plan of a run over `dataset`: a token store, or a plain `datasets.Dataset` with ids and labels (D7)."""
        return build_plan(
            as_token_dataset(dataset),
            capacity=self.capacity,
            packed=self.packed,
            sequential=self.sequential,
            shuffle=self.shuffle,
            global_batch_size=self.global_batch_size,
            num_epochs=self.num_epochs,
            max_steps=self.max_steps,
            total_num_steps=total_num_steps,
            seed=self.seed,
        )

    def train_loader(self, plan: Plan, cursor: Callable[[], int]) -> DataLoader[Any]:
        """This rank's micro-batches, from step `cursor()` on."""
        return build_train_loader(
            plan.dataset,
            plan,
            self.collator,
            rank=self.rank,
            world_size=self.world_size,
            accumulation=self.accumulation,
            micro_batch_size=self.micro_batch_size,
            cursor=cursor,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            cost_ratio=self.attention_cost_ratio,
        )

    def eval_loader(self, dataset: Any) -> DataLoader[Any]:
        """This rank's batches of a held-out split: every sample once, in order."""
        tokens: TokenDataset = as_token_dataset(dataset)
        return build_eval_loader(
            tokens,
            build_eval_plan(tokens, capacity=self.capacity, packed=self.eval_packed),
            self.collator,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=self.eval_batch_size,
        )
