"""What the ranks of a test run: a training like that of one process, and what two trainings must agree in."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.distributed import DistributedConfig

from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.parallel.engine import load_time_sharding
from eft.parallel.group import from_first_rank
from eft.parallel.lora import remake_adapters
from eft.parallel.plan import Degrees
from eft.parallel.state_dict import full_tensors
from eft.runtime.env import Environment
from eft.trainer.trainer import EftTrainer
from tests.distributed.cpu_shim import CpuShimTrainer
from tests.functional.reference import masked, token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

STEPS = 10
LOSS_REL = 1e-6
GRADIENT_REL = 1e-5
WEIGHT_ABS = 1e-5
"""Weights are about 0.15, a step is 1e-2."""


@dataclass
class Trained:
    """The outcome of a training, as rank 0 saw it."""

    losses: list[float]
    norms: list[float]
    evals: list[float]
    weights: dict[str, Tensor]
    """Whole, by name."""
    wrapped: str
    """Class of what was trained."""
    is_fsdp2: bool
    """As accelerate sees it at the end, which decides what it does between micro-batches."""


@dataclass
class Seen(TrainerCallback):
    """Norms of every step, in full precision."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evals: list[float] = field(default_factory=list)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs.get("grad_norm", 0.0)))
        if "eval_loss" in logs:
            self.evals.append(logs["eval_loss"])


def rows(count: int = 41) -> list[dict[str, Any]]:
    """Uneven rows; three fill a bin each and train nothing, so that whole shares of ranks are masked."""
    made = token_rows(count, longest=24, seed=3)
    for number in (4, 5, 6):
        whole = {"input_ids": list(range(3, 51)), "labels": list(range(3, 51))}
        made[number] = masked(whole)
    return made


def model_of(kind: str, split: DistributedConfig | None = None) -> PreTrainedModel:
    """`family`, `family tied`, `family half` (bf16), `family lora` or `family lora dropout`; always the same weights.

    `split`: only this process's part.
    """
    family, _, adapter = kind.partition(" ")
    model = tiny_model(family, tie_word_embeddings=adapter == "tied")
    if adapter == "half":
        model.config.dtype = torch.bfloat16
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    if split is not None:
        folder = from_first_rank(partial(_saved, model))
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split).train()
    if adapter not in ("lora", "lora dropout"):
        return model
    targets = ["q_proj", "v_proj", "down_proj"]
    options = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.1 * (adapter == "lora dropout"))
    torch.manual_seed(0)
    wrapped = get_peft_model(model, options)
    if split is not None:
        torch.manual_seed(0)
        remake_adapters(wrapped)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            start = nn.init.normal_(torch.empty(parameter.shape), std=0.1)
            if isinstance(parameter, DTensor):
                start = distribute_tensor(start, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.data.copy_(start)
    return wrapped  # type: ignore[no-any-return]


def _saved(model: PreTrainedModel) -> str:
    folder = mkdtemp(prefix="eft-tp-")
    model.save_pretrained(folder)
    return folder


def settings(output: Path, **keys: Any) -> dict[str, Any]:
    """Keys of a run of STEPS steps whose global batch is 4 bins; the last step of an epoch has fewer."""
    return {
        "base_model": "given",
        "datasets": [{"path": "given"}],
        "output_dir": str(output),
        "sequence_len": 48,
        "sample_packing": True,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        # Without it Adam turns the rounding of a gradient near zero into a whole step.
        "adam_epsilon": 1e-3,
        "bf16": False,
        "verify_saves": "never",
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 7,
        "stall_timeout": 0,
        **keys,
    }


def build(
    kind: str,
    keys: dict[str, Any],
    evals: list[dict[str, Any]] | None = None,
    trainer_class: type[EftTrainer] = CpuShimTrainer,
) -> EftTrainer:
    """A trainer of this process's rank."""
    config = config_from_mapping(keys)
    degrees = Degrees.resolve(Environment.detect().world_size, config)
    split = load_time_sharding(config, degrees, tiny_model(kind.partition(" ")[0]))
    builder = HFCausalTrainerBuilder(config, model_of(kind, split), tiny_tokenizer())
    builder.trainer_class = trainer_class
    builder.train_dataset, builder.eval_dataset = rows(), evals
    return builder.build()


def train(
    rank: int,
    kind: str,
    keys: dict[str, Any],
    evals: list[dict[str, Any]] | None = None,
    resume: str | None = None,
    stop_after: int | None = None,
) -> Trained:
    """Train; `stop_after`: leave with a checkpoint after that step, as a signal would."""
    trainer = build(kind, keys, evals)
    seen = Seen()
    trainer.add_callback(seen)
    if stop_after is not None:
        trainer.add_callback(Stop(stop_after))
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: tensor.detach().clone() for name, tensor in full_tensors(trainer.model)}
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    wrapped = f"{type(trainer.model_wrapped).__name__}{' of DTensors' if sharded else ''}"
    is_fsdp2 = trainer.accelerator.is_fsdp2
    return Trained(seen.losses, seen.norms, seen.evals, weights if rank == 0 else {}, wrapped, is_fsdp2)


@dataclass
class Stop(TrainerCallback):
    """Saves and stops after a step."""

    step: int

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def differences(got: Trained, expected: Trained, *, start: int = 0) -> list[str]:
    """Where E2 does not hold between two trainings; `got` may begin after step `start`."""
    found = []
    steps = range(start, len(expected.losses))
    if len(got.losses) != len(steps):
        return [f"{len(got.losses)} steps, expected {len(steps)}"]
    for step, loss, norm in zip(steps, got.losses, got.norms, strict=True):
        if not abs(loss - expected.losses[step]) <= LOSS_REL * STEPS * abs(expected.losses[step]):
            found.append(f"loss of step {step + 1}: {loss} instead of {expected.losses[step]}")
        if not abs(norm - expected.norms[step]) <= GRADIENT_REL * STEPS * abs(expected.norms[step]):
            found.append(f"gradient norm of step {step + 1}: {norm} instead of {expected.norms[step]}")
    if set(got.weights) != set(expected.weights):
        found.append(f"weights {sorted(set(got.weights) ^ set(expected.weights))}")
        return found
    for name, tensor in expected.weights.items():
        gap = float((got.weights[name].float() - tensor.float()).abs().max())
        if not gap <= WEIGHT_ABS:
            found.append(f"{name} is off by {gap:.2e}")
    return found


def save_again(rank: int, kind: str, keys: dict[str, Any], source: str) -> None:
    """Resume from `source`, the run's last step, and write what was read."""
    trainer = build(kind, keys)
    trainer.train(resume_from_checkpoint=source)
    trainer._save_checkpoint(trainer.model)
    trainer.parts.checkpoint.wait()
