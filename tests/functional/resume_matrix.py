"""E3 as a matrix: what is trained × optimizer × packing × the moment of the interruption.

    python -m tests.functional.resume_matrix            # every combination, and docs/resume.md written anew

One straight run per model, optimizer and packing; for each moment a run of the same config that is interrupted there,
continued by a new trainer over a new model, and compared with the straight one: sample ids of every step, learning
rates, losses, gradient norms, held-out losses, weights, optimizer state and generators, all bit for bit. Dropout is on.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.models.adapters import apply_adapter
from eft.runtime.checkpoint import CheckpointStore
from eft.runtime.rng import capture_rng
from eft.trainer.trainer import EftTrainer
from tests.functional.reference import SampleRecorder, token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "resume.md"

MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"adapter": "lora", "lora_r": 2, "lora_target_linear": True, "lora_dropout": 0.1},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw_torch_fused", "weight_decay": 0.1},
    "Lion": {"optimizer": "lion_pytorch", "learning_rate": 3e-3},
    "ADOPT": {"optimizer": "adopt_adamw"},
    "schedule-free": {"optimizer": "schedule_free_adamw", "warmup_steps": 2},
    "8-bit": {"optimizer": "adamw_8bit", "optim_args": {"min_8bit_size": 64}},
}
PACKINGS = {"packed": {"sample_packing": True}, "one sample a row": {"sample_packing": False}}

_EVALUATED = {"val_set_size": 0.1, "eval_steps": 2}
_WORSE = {
    "val_set_size": 0.1,
    "eval_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler": "constant_with_warmup",
    "warmup_steps": 1,
}
"""Held-out random rows only get worse."""


@dataclass(frozen=True)
class Moment:
    """When a run is interrupted, and what it does beside training."""

    keys: dict[str, Any]
    stop: int | None = None
    """Saves and stops after this step, as for a signal; negative: counted from the last step."""
    killed_in_evaluation: int | None = None
    """Killed without a save inside the evaluation of this step."""
    killed_after: int | None = None
    """Killed without a save after this step; negative: counted from the last step."""


MOMENTS = {
    "in the middle of an epoch": Moment({}, stop=2),
    "at an epoch's end": Moment({}, stop=4),
    "before the last step": Moment({}, stop=-1),
    "in the last step, killed": Moment({"save_steps": 3}, killed_after=-1),
    "during an evaluation, killed": Moment({**_EVALUATED, "save_steps": 3}, killed_in_evaluation=4),
    "with early stopping": Moment({**_WORSE, "early_stopping_patience": 4}, stop=3),
    "with best-model tracking": Moment({**_WORSE, "load_best_model_at_end": True, "save_steps": 1}, stop=3),
}
"""Four steps an epoch, two epochs."""

COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "tokens", "trained_tokens")


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    model: str
    optimizer: str
    packing: str
    moment: str


def all_cases() -> Iterator[Case]:
    """The whole matrix."""
    return (Case(*names) for names in product(MODELS, OPTIMIZERS, PACKINGS, MOMENTS))


def cover() -> list[Case]:
    """Cases in which every moment, and every pair of model, optimizer and packing's neighbours, occurs; ten of them."""
    models, packings, moments = list(MODELS), list(PACKINGS), list(MOMENTS)
    return [
        Case(models[(row + column) % 2], optimizer, packings[column], moments[(2 * row + column) % len(moments)])
        for row, optimizer in enumerate(OPTIMIZERS)
        for column in range(2)
    ]


class Killed(BaseException):
    """Ends a training as `kill -9` does: nothing after it runs but what any process leaves on the disk."""


class Interrupt(TrainerCallback):
    """Stops or kills at a moment."""

    def __init__(self, moment: Moment, last: int) -> None:
        self.stop = moment.stop if moment.stop is None or moment.stop > 0 else last + moment.stop
        after = moment.killed_after
        self.killed_after = after if after is None or after > 0 else last + after
        self.killed_in_evaluation = moment.killed_in_evaluation

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.stop:
            control.should_save = control.should_training_stop = True
        return control

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.killed_after:
            raise Killed

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.killed_in_evaluation:
            raise Killed


@dataclass
class Result:
    """All that two runs must agree in."""

    step: int
    reason: str
    training_loss: float
    rows: list[dict[str, float]]
    samples: list[list[int]]
    tensors: dict[str, Any]
    generators: Any


class Runs:
    """Runs of cases in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tiny_tokenizer()
        self.rows, self.held_out = token_rows(14), token_rows(4, seed=9)
        self._straight: dict[Any, Result] = {}

    def differences(self, case: Case) -> list[str]:
        """Where the interrupted and continued run differs from the straight one; empty: nowhere."""
        moment = MOMENTS[case.moment]
        name = "-".join((case.model, case.optimizer, case.packing, case.moment)).replace(" ", "_").replace(",", "")
        config = self._config(case, name)
        # Moments without keys of their own share a straight run.
        key = (case.model, case.optimizer, case.packing, str(sorted(moment.keys)))
        if key not in self._straight:
            straight_config = config.model_copy(update={"output_dir": str(self.folder / f"{name}-straight")})
            self._straight[key] = self._train(straight_config, None, None)
        straight = self._straight[key]
        first = self._train(config, moment, None, last=straight.step)
        found = CheckpointStore(Path(config.output_dir), save_total_limit=None).newest_complete().path
        if found is None:
            return ["no checkpoint"]
        resumed = self._train(config, None, str(found))
        shutil.rmtree(config.output_dir)
        at = int(found.name.split("-")[1])
        resumed = replace(resumed, samples=first.samples[:at] + resumed.samples)
        return [
            *(f"{field}" for field in ("step", "reason", "training_loss", "rows", "samples", "generators")
              if getattr(resumed, field) != getattr(straight, field)),
            *(name for name in straight.tensors.keys() | resumed.tensors.keys()
              if not _same(straight.tensors.get(name), resumed.tensors.get(name))),
        ]  # fmt: skip

    def _config(self, case: Case, name: str) -> TrainConfig:
        moment = MOMENTS[case.moment]
        keys = {**MODELS[case.model], **OPTIMIZERS[case.optimizer], **PACKINGS[case.packing], **moment.keys}
        if case.packing != "packed":
            keys["gradient_accumulation_steps"] = 4  # fourteen rows in four steps
        return config_from_mapping(
            {
                "base_model": "in memory",
                "datasets": [{"path": "in memory"}],
                "output_dir": str(self.folder / name),
                "sequence_len": 48,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "num_epochs": 2,
                "learning_rate": 1e-2,
                "bf16": False,
                "save_steps": 1000,
                "verify_saves": "never",
                "preflight": False,
                **keys,
            }
        )

    def _train(self, config: TrainConfig, moment: Moment | None, checkpoint: str | None, last: int = 0) -> Result:
        # What the caller's generators hold must not matter.
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(77 if checkpoint is None else 5)
        model = apply_adapter(tiny_model("llama", attention_dropout=0.1), config, seed=config.seed)
        builder = HFCausalTrainerBuilder(config, model, self.tokenizer)
        builder.train_dataset = self.rows
        builder.eval_dataset = self.held_out if config.val_set_size else None
        trainer = builder.build()
        if moment is not None:
            trainer.add_callback(Interrupt(moment, last))
        packing: Any = trainer.parts.packing
        recorder = SampleRecorder(packing.collator, [*self.rows, *self.held_out])
        trainer.parts.packing = replace(packing, collator=recorder)
        loss = 0.0
        with suppress(Killed):
            loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        return _result(trainer, loss, self._steps(recorder, config))

    def _steps(self, recorder: SampleRecorder, config: TrainConfig) -> list[list[int]]:
        """Row numbers of each training step: held-out rows have the highest numbers."""
        training = [batch for batch in recorder.micro_batches if not batch or max(batch) < len(self.rows)]
        size = config.gradient_accumulation_steps or 1
        return [sorted(sum(training[at : at + size], [])) for at in range(0, len(training), size)]


def _result(trainer: EftTrainer, loss: float, samples: list[list[int]]) -> Result:
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    tensors: dict[str, Any] = {f"weights {name}": value for name, value in trainer.model.state_dict().items()}
    for parameter, state in trainer.plain_optimizer().state.items():
        tensors |= {f"optimizer {names[id(parameter)]} {key}": value for key, value in state.items()}
    generators = capture_rng()
    history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    return Result(
        trainer.state.global_step,
        trainer.outcome.reason,
        loss,
        [{name: row[name] for name in COMPARED if name in row} for row in history],
        samples,
        copy.deepcopy(tensors),
        (generators.plain, {name: tensor.tolist() for name, tensor in generators.tensors.items()}),
    )


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return type(left) is type(right) and left == right
    if type(left) is not Tensor and hasattr(left, "dequantize"):
        left, right = left.dequantize(), right.dequantize()
    return left.dtype == right.dtype and torch.equal(left, right)


BY_HAND = "## Other numbers of processes"
"""From here on the page stays as it is."""


def write_page(outcomes: dict[Case, list[str]]) -> None:
    """docs/resume.md: one table per moment."""
    held = sum(not found for found in outcomes.values())
    lines = [
        "# Resume, every combination",
        "",
        "Written by `python -m tests.functional.resume_matrix`"
        f" ({date.today().isoformat()}, torch {torch.__version__}, CPU): a run of two epochs is"
        " interrupted, continued by a new trainer over a new model, and compared with the run that nobody touched:"
        " sample ids, learning rates, losses, gradient norms, held-out losses, weights, optimizer state, generators."
        ' Dropout is on. "=": all of them equal, bit for bit. "Killed": nothing is saved at that moment; the run'
        " continues from an earlier checkpoint.",
        "",
        f"{held} of {len(outcomes)} combinations are bit-equal.",
        "",
    ]
    rows = [(model, packing) for model in MODELS for packing in PACKINGS]
    for moment in MOMENTS:
        lines += [
            f"## Interrupted {moment}",
            "",
            f"| | {' | '.join(OPTIMIZERS)} |",
            f"|---|{'---|' * len(OPTIMIZERS)}",
        ]
        for model, packing in rows:
            cells = [outcomes.get(Case(model, optimizer, packing, moment)) for optimizer in OPTIMIZERS]
            marks = ["not run" if found is None else "=" if not found else f"differs: {found[0]}" for found in cells]
            lines.append(f"| {model}, {packing} | {' | '.join(marks)} |")
        lines.append("")
    by_hand = "".join(PAGE.read_text().partition(BY_HAND)[1:]) if PAGE.is_file() else ""
    PAGE.write_text("\n".join(lines) + "\n" + by_hand)


def main() -> int:
    """Run the matrix, print what differs, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-write", action="store_true", help="leave docs/resume.md alone")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        outcomes = {}
        for case in all_cases():
            outcomes[case] = runs.differences(case)
            if outcomes[case]:
                print(f"{case}: {', '.join(outcomes[case][:5])}", flush=True)
    print(f"{sum(not found for found in outcomes.values())} of {len(outcomes)} bit-equal")
    if not options.no_write:
        write_page(outcomes)
    return int(any(outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
