"""E2 over ranks: one global batch of the user's own rows, by one plain program and by several processes over gloo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import ProcessException, start_processes

from eft.config.root import TrainConfig
from eft.core.errors import ModelError
from eft.core.records import PromiseResult, TokenSample
from eft.data.dataset_meta import DatasetMeta
from eft.inputs import load_trainable_model, plan_of, prepare_tokenizer
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import (
    LIMITS,
    compare_gradients,
    exact_arithmetic,
    plain_loss,
    stock_attention,
    take_gradients,
)
from eft.verify.excerpt import as_dataset, first_documents
from eft.verify.loss import LONGEST, NUM_DOCUMENTS, first_step
from eft.verify.verification import Verification

TITLE = "a global batch on several processes = the same on one"
ACCUMULATION = 2
TIMEOUT_S = 600.0

ONE_COPY_EACH = {
    "fsdp_version": None,
    "fsdp_config": None,
    "dp_shard_size": None,
    "dp_replicate_size": None,
    "tensor_parallel_size": 1,
    "context_parallel_size": 1,
    "optimizer_in_backward": False,
}
"""Every process holds all weights (DDP): what else splits a model runs on accelerators only."""

_LOSS = "loss"
_GRADIENT = "gradient."


@dataclass(frozen=True)
class RanksJob:
    """What each process of a check is given."""

    config: TrainConfig
    documents: Sequence[TokenSample]
    folder: Path
    trainer_class: type[EftTrainer]
    """Importable by its name."""

    def verification(self, world_size: int, part: str = "", *, global_batch_size: int | None = None) -> Verification:
        """The user's model by DDP, over the excerpt; default of a step: one micro-batch of each process.

        `part`: its folder in the job's.
        """
        batch = {"global_batch_size": global_batch_size or world_size * self.config.micro_batch_size}
        config = self.config.model_copy(update={**ONE_COPY_EACH, "gradient_accumulation_steps": None, **batch})
        tokenizer = prepare_tokenizer(config)
        load = partial(load_trainable_model, config, tokenizer)
        dataset = as_dataset(self.documents)
        plan = plan_of(config, dataset, world_size)
        meta = DatasetMeta(dataset, None, plan.total_steps)
        folder = self.folder / part
        return Verification(config, folder, tokenizer, meta, load(), plan, world_size, load, self.trainer_class)


def in_new_processes(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """`work(rank, *arguments)` in `count` processes.

    Raises:
        ModelError: one failed; the message is its own.
    """
    try:
        start_processes(work, arguments, count, start_method="spawn")
    except ProcessException as error:
        raise ModelError(str(error).strip().splitlines()[-1]) from error


def check_ranks(
    verification: Verification,
    num_processes: int,
    trainer_class: type[EftTrainer] = EftTrainer,
    start: Callable[[Callable[..., None], tuple[Any, ...], int], None] = in_new_processes,
) -> PromiseResult:
    """E2 on the first documents of the plan: loss and gradients of one step of `num_processes` processes on the CPU.

    They are shared out and accumulated as the run's own loader does it, and averaged by DDP; the reference is a plain
    program in this process. Call it inside `exact_arithmetic`, before any weight has moved. Leaves no gradients.

    Args:
        trainer_class: what the processes train with; importable by its name.
        start: runs (work, arguments) in so many processes; returns once all are done.
    """
    title = f"{TITLE} ({num_processes} processes)"
    if verification.load_model is None:
        return PromiseResult("E2", title, "not applicable", "the model was handed in; processes load it by the config")
    documents = first_documents(verification.plan, NUM_DOCUMENTS, LONGEST)
    model = verification.model
    model.train()
    with stock_attention(model):
        expected_loss = plain_loss(model, documents, verification.objective())
    expected = take_gradients(model)
    job = RanksJob(verification.config_with({}), documents, verification.folder, trainer_class)
    start(_run_rank, (num_processes, job), num_processes)
    measured = load_file(_answer(verification.folder))
    loss = float(measured.pop(_LOSS))
    gap = compare_gradients({name.removeprefix(_GRADIENT): tensor for name, tensor in measured.items()}, expected)
    dtypes = {tensor.dtype for tensor in (*measured.values(), *expected.values())}
    limits = LIMITS[torch.float64 if dtypes == {torch.float64} else torch.float32]
    loss_gap = abs(loss - expected_loss) / abs(expected_loss)
    faults = []
    if not loss_gap <= limits.loss:
        faults.append(f"loss {loss:.7g}, expected {expected_loss:.7g}")
    if not gap.is_within(limits):
        faults.append(f"gradients differ by {gap.share:.1e} in {gap.tensor or 'all'}")
    detail = (
        f"{len(documents)} documents, {sum(len(document.input_ids) for document in documents)} tokens over gloo, each "
        f"process accumulating {ACCUMULATION}: loss {loss_gap:.1e}, gradients {gap.share:.1e} from plain cross entropy"
    )
    numbers = {"loss": loss_gap, "gradients": gap.share, "processes": float(num_processes)}
    return PromiseResult("E2", title, "fail" if faults else "pass", "; ".join([*faults, detail]), numbers)


def _answer(folder: Path) -> Path:
    return folder / "ranks.safetensors"


def _run_rank(rank: int, world_size: int, job: RanksJob) -> None:
    """In a process of its own: this rank's share of the step; rank 0 writes what came of it."""
    with as_rank(rank, world_size, job.folder / "meeting"):
        verification = job.verification(world_size)
        with exact_arithmetic(verification.model):
            answer = _step(verification, rank, world_size)
        if rank == 0:
            save_file(answer, _answer(job.folder))
        dist.barrier()


@contextlib.contextmanager
def as_rank(rank: int, world_size: int, meeting: Path) -> Iterator[None]:
    """This process as one of a group, whose processes meet in a file; in the group that there is."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    # Of this process alone. Accelerators are hidden: there may be fewer of them than processes.
    os.environ.update({name: str(value) for name, value in here.items()} | {"CUDA_VISIBLE_DEVICES": ""})
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    if dist.is_initialized():
        yield
        return
    timeout, address = timedelta(seconds=TIMEOUT_S), f"file://{meeting}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _step(verification: Verification, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The global batch's loss, and its gradients by name, after DDP has averaged them."""
    trainer = verification.build_exact_trainer()
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    dataset: Any = verification.meta.train_dataset
    batches = first_step(trainer.parts.packing, dataset, ACCUMULATION, rank=rank, world_size=world_size)
    weight = trainer._get_num_items_in_batch(batches, trainer.args.device)
    loss = torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)
        with contextlib.nullcontext() if is_last else trainer.accelerator.no_sync(model):
            loss += trainer.training_step(model, batch, weight).double()
    # Each process's loss is its share times the number of processes.
    dist.all_reduce(loss)
    gradients = {f"{_GRADIENT}{name}": tensor for name, tensor in take_gradients(trainer.model).items()}
    return {_LOSS: loss / world_size, **gradients}
