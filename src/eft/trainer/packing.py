"""PackingMixin: the plan's micro-batches instead of Trainer's samplers."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from eft.core.errors import DataError
from eft.trainer.hooks import TrainerHooks


class PackingMixin(TrainerHooks):
    """Loads what the plan says (DESIGN D1). The loaders are not given to accelerate: they know their rank."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One sized loader for the whole run; iteration starts at the step that the state has reached by then."""
        return self.parts.packing.train_loader(self.plan, cursor=lambda: int(self.state.global_step))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Every row of the held-out split once, in order, with the same boundaries as in training (D13)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        if dataset is None or len(dataset) == 0:
            raise DataError("evaluation needs held-out data: set `val_set_size` or `test_datasets`, or pass a data set")
        return self.parts.packing.eval_loader(dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As for evaluation: `predict` gives the same metrics, of any data set."""
        return self.get_eval_dataloader(test_dataset)
