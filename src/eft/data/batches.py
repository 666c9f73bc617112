"""Plans and loaders of one run: what the trainer asks for, made of `plan`, `collators` and `loader`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.data import DataLoader

from eft.core.errors import DataError
from eft.core.records import TokenDataset
from eft.data.balance import RankShare
from eft.data.collators import Collator
from eft.data.loader import build_eval_loader, build_stream_loader, build_train_loader
from eft.data.packing import Strategy
from eft.data.plan import Plan, build_eval_plan, build_plan
from eft.data.sample_set import SampleSet
from eft.data.store import as_token_dataset
from eft.data.stream import StreamDataset, WindowRule
from eft.data.stream_plan import StreamPlan, build_stream_plan


@dataclass(frozen=True)
class BatchSource:
    """Everything that decides which tokens are in which micro-batch of which rank."""

    collator: Collator
    capacity: int
    """Longest bin, in tokens."""
    packed: bool
    eval_packed: bool
    sequential: bool
    strategy: Strategy | Literal["auto"]
    bin_samples: int | None
    """Most samples of a bin."""
    balance_buffer: int | None
    """Steps among which bins are sorted by cost."""
    shuffle: bool
    seed: int
    num_epochs: float
    max_steps: int | None
    global_batch_size: int
    share: RankShare
    """What of each step is this rank's."""
    eval_batch_size: int
    num_workers: int
    pin_memory: bool
    vocabulary_rows: int
    """Rows of the model's embedding; ids from 0 to one less can be looked up."""
    position_rows: int | None
    """Tokens of a document that the model's table of positions can number; None where it has no such table."""
    buffer_samples: int = 1
    """Samples of a stream that are shuffled and packed together."""
    token_budget: int | None = None
    """How long to train on a stream, in tokens of capacity."""
    _eval_sets: dict[int, tuple[Any, TokenDataset]] = field(default_factory=dict, compare=False, repr=False)
    """Held-out sets by `id`: an evaluation repeats, reading all rows of a foreign set for their lengths need not."""

    def make_plan(self, dataset: Any, total_num_steps: int | None) -> Plan | StreamPlan:
        """The plan of a run over `dataset`: a token store, a plain `datasets.Dataset` with ids and labels (D7), or a
        stream.

        Raises DataError for an empty data set, one that trains nothing, samples that fit no bin, ids that the model
        has no row for.
        """
        if isinstance(dataset, StreamDataset):
            return self._stream_plan(dataset, total_num_steps)
        tokens = as_token_dataset(dataset)
        check_vocabulary(tokens, self.vocabulary_rows)
        check_positions(tokens, self.position_rows)
        return build_plan(
            tokens,
            capacity=self.capacity,
            packed=self.packed,
            sequential=self.sequential,
            shuffle=self.shuffle,
            global_batch_size=self.global_batch_size,
            num_epochs=self.num_epochs,
            max_steps=self.max_steps,
            total_num_steps=total_num_steps,
            seed=self.seed,
            strategy=self.strategy,
            bin_samples=self.bin_samples,
            balance_buffer=self.balance_buffer,
            cost_ratio=self.share.cost_ratio,
        )

    def _stream_plan(self, dataset: StreamDataset, total_num_steps: int | None) -> StreamPlan:
        rule = WindowRule.of(
            buffer_samples=self.buffer_samples,
            capacity=self.capacity,
            packed=self.packed,
            sequential=self.sequential,
            strategy=self.strategy,
            bin_samples=self.bin_samples,
            shuffle=self.shuffle,
            seed=self.seed,
            vocabulary_rows=self.vocabulary_rows,
            position_rows=self.position_rows,
        )
        return build_stream_plan(
            dataset,
            rule,
            global_batch_size=self.global_batch_size,
            max_steps=self.max_steps,
            token_budget=self.token_budget,
            total_num_steps=total_num_steps,
        )

    def state_at(self, plan: Plan | StreamPlan, step: int) -> dict[str, Any]:
        """What a resumed run must know of the data beside the step; JSON-able, empty where the plan is arithmetic."""
        return plan.state_at(step) if isinstance(plan, StreamPlan) else {}

    def restore(self, plan: Plan | StreamPlan, step: int, state: dict[str, Any]) -> None:
        """Take over what `state_at(step)` gave to a checkpoint."""
        if isinstance(plan, StreamPlan):
            plan.restore(step, state)

    def train_loader(self, plan: Plan | StreamPlan, cursor: Callable[[], int]) -> DataLoader[Any]:
        """This rank's micro-batches, from step `cursor()` on."""
        if isinstance(plan, StreamPlan):
            return build_stream_loader(plan, self.collator, share=self.share, cursor=cursor, pin_memory=self.pin_memory)
        return build_train_loader(
            plan.dataset,
            plan,
            self.collator,
            share=self.share,
            cursor=cursor,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def eval_loader(self, dataset: Any) -> DataLoader[Any]:
        """This rank's batches of a held-out split: every sample once, in order."""
        tokens = self._eval_set(dataset)
        return build_eval_loader(
            tokens,
            build_eval_plan(tokens, capacity=self.capacity, packed=self.eval_packed),
            self.collator,
            rank=self.share.rank,
            world_size=self.share.world_size,
            batch_size=self.eval_batch_size,
        )

    def _eval_set(self, dataset: Any) -> TokenDataset:
        known = self._eval_sets.get(id(dataset))
        if known is not None:
            return known[1]
        tokens = as_token_dataset(dataset)
        check_vocabulary(tokens, self.vocabulary_rows)
        check_positions(tokens, self.position_rows)
        self._eval_sets[id(dataset)] = (dataset, tokens)  # holding it keeps its `id` from being used again
        return tokens


def check_vocabulary(dataset: TokenDataset, vocabulary_rows: int) -> None:
    """Raise DataError naming the first sample with an id that an embedding of `vocabulary_rows` rows does not have.

    Free where a store says that no id is so large; a `TokenDataset` of someone else's making is not read for this.
    """
    if not isinstance(dataset, SampleSet) or dataset.largest_id < vocabulary_rows:
        return
    for index in range(len(dataset)):
        ids = dataset.sample(index).input_ids
        at = int(ids.argmax())
        if ids[at] >= vocabulary_rows:
            raise DataError(
                f"{dataset.origin(index)}: input_ids[{at}] is {ids[at]}, but the model's embedding has "
                f"{vocabulary_rows} rows (ids 0 to {vocabulary_rows - 1}); tokenise with the model's own tokenizer, or "
                "resize the embedding after adding tokens"
            )


def check_positions(dataset: TokenDataset, position_rows: int | None) -> None:
    """Raise DataError naming the longest sample where it is longer than the model's table of learned positions."""
    if position_rows is None or len(dataset) == 0:
        return
    longest = int(dataset.lengths.argmax())
    if dataset.lengths[longest] > position_rows:
        where = dataset.origin(longest) if isinstance(dataset, SampleSet) else f"sample {longest}"
        raise DataError(
            f"{where}: {dataset.lengths[longest]} tokens, but the model's table of learned positions has "
            f"{position_rows}; set `sequence_len: {position_rows}` or less"
        )
