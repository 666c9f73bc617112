"""The callback that looks at every dtype after the first step of a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from eft.core.errors import PromiseBroken
from eft.core.records import PromiseResult
from eft.models.attention import base_of
from eft.runtime.dtype_ledger import Announced, check_dtypes
from eft.trainer.trainer import EftTrainer


class DtypeLedger(TrainerCallback):
    """Asserts the ledger while the first step's gradients are there; a surprise stops the run with the names."""

    def __init__(self, announced: Announced, promises: list[PromiseResult]) -> None:
        self.announced = announced
        self.promises = promises
        self.trainer: EftTrainer | None = None
        self.is_done = False
        self._products: dict[str, torch.dtype] = {}
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every training is looked at."""
        self.is_done = False
        self._forget()
        head = None if self.trainer is None else base_of(self.trainer.model).get_output_embeddings()
        if head is not None:
            self._hook = head.register_forward_hook(self._see_product)

    def _forget(self) -> None:
        self._products = {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _see_product(self, head: nn.Module, _: Any, output: Any) -> None:
        # An evaluation before the first step may run under another context than training does.
        if head.training and isinstance(output, Tensor):
            self._products["the output head"] = output.dtype

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """A step whose gradients a loss scaler threw away left no state; then the next one is looked at."""
        if self.is_done or self.trainer is None:
            return
        optimizer = self.trainer.plain_optimizer()
        if not optimizer.state and self.announced.state != "none":
            return
        self.is_done = True
        result = check_dtypes(self.trainer.model, optimizer, self.announced, self.trainer._tr_loss, self._products)
        self._forget()
        self.promises.append(result)
        if result.status == "fail":
            raise PromiseBroken(f"{result.promise} {result.title}: {result.detail}")
