"""E3 over ranks: a short run of several processes over gloo, stopped and continued by as many of them and by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from eft.core.atomic import write_json
from eft.core.constants import IGNORE_INDEX
from eft.core.errors import ModelError
from eft.core.hashing import hash_bytes
from eft.core.records import PromiseResult, TokenSample
from eft.trainer.dtypes import DtypeLedger
from eft.trainer.trainer import EftTrainer
from eft.verify.exact import LIMITS, Limits, compare_gradients, dtype_name, exact_arithmetic
from eft.verify.ranks import RanksJob, as_rank, in_new_processes
from eft.verify.rehearsal import STOP, check_resume, rehearsal_trainer, rehearse, short_documents, short_run
from eft.verify.verification import FULL_PRECISION, NO_KERNELS, Verification

TITLE = "a run of {0} processes, continued by {1} = never stopped"

PLAIN_UPDATES = {"optimizer": "adamw_torch", "optim_args": None, "bf16_update": "stochastic_rounding"}
"""What knows fp64. The run's own optimizer is in the comparison bit by bit."""

_STEPS, _GRADIENTS, _RESULTS = "steps.json", "gradients.safetensors", "results.json"


@dataclass
class Steps:
    """What several processes did together, or one alone."""

    rows: list[dict[str, float]]
    """Of every logged step, also of those before the stop."""
    documents: list[list[str]]
    """Fingerprints of what was fed in each step that was trained here, sorted."""
    dtype: str
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step after the stop, as clipped."""


def check_resume_over_ranks(
    verification: Verification,
    num_processes: int,
    trainer_class: type[EftTrainer] = EftTrainer,
    start: Callable[[Callable[..., None], tuple[Any, ...], int], None] = in_new_processes,
) -> list[PromiseResult]:
    """E3 of a rehearsal in `num_processes` processes on the CPU (DDP).

    Continued by as many: as `check_resume` does it on one, in every process, in the run's own precision and with
    dropout. Continued by one: loss, gradients and learning rates after the stop in fp64 without dropout, and the
    documents of each step.

    Args:
        trainer_class: what the processes train with; importable by its name.
        start: runs (work, arguments) in so many processes; returns once all are done.
    """
    titles = [TITLE.format(num_processes, number) for number in (num_processes, 1)]
    if verification.load_model is None:
        reason = "the model was handed in; processes load it by the config"
        return [PromiseResult("E3", title, "not applicable", reason) for title in titles]
    batch = num_processes * verification.config.micro_batch_size
    documents, _ = short_documents(verification, batch)
    folder = verification.folder / "ranks"
    folder.mkdir(parents=True)
    job = RanksJob(verification.config_with({}), documents, folder, trainer_class)
    start(_run_rank, (num_processes, job), num_processes)
    own = [PromiseResult(**row) for row in json.loads((folder / _RESULTS).read_text())]
    failed = [f"rank {rank}: {result.detail}" for rank, result in enumerate(own) if result.status == "fail"]
    first = replace(own[0], title=titles[0])
    if failed:
        first = replace(first, status="fail", detail="; ".join(failed))
    together = Steps(**json.loads((folder / _STEPS).read_text()), gradients=load_file(folder / _GRADIENTS))
    alone = replace(job, trainer_class=EftTrainer).verification(1, "exact", global_batch_size=batch)
    return [first, _compared(titles[1], together, _exact_steps(alone, continues=True))]


def _run_rank(rank: int, world_size: int, job: RanksJob) -> None:
    """In a process of its own; rank 0 writes what came of it."""
    with as_rank(rank, world_size, job.folder / "meeting"):
        verification = job.verification(world_size, "own")
        rehearsal = rehearse(verification)
        if rehearsal.error is not None:
            raise ModelError(rehearsal.error)
        results = _from_all(check_resume(verification, rehearsal))
        del rehearsal, verification
        mine = _exact_steps(job.verification(world_size, "exact"), continues=False)
        shares = _from_all(mine.documents)
        if rank == 0:
            documents_of_steps = [sorted(chain.from_iterable(step)) for step in zip(*shares, strict=True)]
            steps = {"rows": mine.rows, "documents": documents_of_steps, "dtype": mine.dtype}
            write_json(job.folder / _RESULTS, [asdict(result) for result in results])
            write_json(job.folder / _STEPS, steps)
            save_file(mine.gradients, job.folder / _GRADIENTS)
        dist.barrier()


def _from_all(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@dataclass
class _Recorder(TrainerCallback):
    """Notes documents where they are collated, and gradients before the first update after the stop."""

    trainer: EftTrainer
    documents: list[list[str]] = field(default_factory=list)
    """Of each micro-batch."""
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        packing: Any = self.trainer.parts.packing
        self._collate = packing.collator
        self.trainer.parts.packing = replace(packing, collator=self._note)

    def _note(self, bins: Sequence[Sequence[TokenSample]]) -> Any:
        samples = [sample for part in bins for sample in part]
        # What trains nothing stands in for a micro-batch that is missing.
        trained = [sample for sample in samples if (np.asarray(sample.labels)[1:] != IGNORE_INDEX).any()]
        self.documents.append([hash_bytes(np.ascontiguousarray(sample.input_ids).tobytes()) for sample in trained])
        return self._collate(bins)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clipped already."""
        if state.global_step == STOP:
            pairs = ((name, parameter.grad) for name, parameter in self.trainer.model.named_parameters())
            self.gradients = {name: gradient.detach().cpu().clone() for name, gradient in pairs if gradient is not None}


def _exact_steps(verification: Verification, *, continues: bool) -> Steps:
    """The rehearsal in fp64, from its start or from the checkpoint in the verification's folder. Moves the weights."""
    short, dataset = short_run(verification)
    attention = {"attn_implementation": "eft"} if "flash" in short.attn_implementation else {}
    config = short.model_copy(update={**FULL_PRECISION, **NO_KERNELS, **PLAIN_UPDATES, **attention})
    with exact_arithmetic(verification.model):
        trainer = rehearsal_trainer(verification, config, dataset)
        # Nothing here has the dtypes that were announced.
        trainer.remove_callback(DtypeLedger)
        recorder = _Recorder(trainer)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=str(trainer.parts.checkpoint.path(STOP)) if continues else None)
        rows = [row for row in trainer.state.log_history if "loss" in row]
        size = int(trainer.args.gradient_accumulation_steps)
        starts = range(0, len(recorder.documents), size)
        documents = [sorted(chain.from_iterable(recorder.documents[at : at + size])) for at in starts]
        return Steps(rows, documents, dtype_name(verification.model), recorder.gradients)


def _compared(title: str, together: Steps, alone: Steps) -> PromiseResult:
    """E3 on another world size: equal documents and learning rates, losses and gradients within E2."""
    if together.dtype != alone.dtype:
        detail = f"{together.dtype} in the processes, {alone.dtype} here, for want of memory"
        return PromiseResult("E3", title, "not applicable", detail)
    limits = LIMITS[torch.float64 if alone.dtype == "fp64" else torch.float32]
    faults = [] if together.documents[STOP:] == alone.documents else ["other documents in a step"]
    worst, wrong = _other_numbers(together.rows, alone.rows, limits)
    gap = compare_gradients(alone.gradients, together.gradients)
    if not gap.is_within(limits):
        wrong.append(f"gradients of step {STOP + 1} differ by {gap.share:.1e} in {gap.tensor or 'all'}")
    detail = (
        f"{len(alone.documents)} steps of {sum(map(len, alone.documents))} documents and their learning rates equal; "
        f"losses {worst:.1e}, gradients {gap.share:.1e} apart, in {alone.dtype}, updates by AdamW"
    )
    numbers = {"loss": worst, "gradients": gap.share, "steps": float(len(alone.documents))}
    faults += wrong
    return PromiseResult("E3", title, "fail" if faults else "pass", "; ".join(faults) or detail, numbers)


def _other_numbers(
    together: list[dict[str, float]], alone: list[dict[str, float]], limits: Limits
) -> tuple[float, list[str]]:
    """The largest relative difference of a loss after the stop, and what differs by more than rounding, in words."""
    if len(together) != len(alone):
        return 0.0, [f"{len(alone)} logged steps, not {len(together)}"]
    worst, wrong = 0.0, []
    for before, after in zip(together[STOP:], alone[STOP:], strict=True):
        share = abs(after["loss"] - before["loss"]) / abs(before["loss"])
        worst = max(worst, share)
        if after["learning_rate"] != before["learning_rate"]:
            wrong.append(f"learning rate of step {int(before['step'])}")
        if not share <= limits.loss:
            wrong.append(f"loss of step {int(before['step'])}: {after['loss']:.9g}, not {before['loss']:.9g}")
    return worst, wrong
