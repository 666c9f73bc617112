"""What every contender's process shares: the pipe to the benchmark, memory, and a callback that trains on command.

Imports nothing of eft: the peers run it in environments of their own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Link:
    """JSON lines over two inherited file descriptors, given as `argv[1]` and `argv[2]`; settings are in `argv[3]`."""

    def __init__(self) -> None:
        self._commands = os.fdopen(int(sys.argv[1]), "r")
        self._replies = os.fdopen(int(sys.argv[2]), "w")
        self.settings: dict[str, Any] = json.loads(Path(sys.argv[3]).read_text())
        torch.set_num_threads(self.settings["threads"])
        self.baseline = resident_bytes()
        """Resident memory after the imports, before the model is there."""

    def reply(self, **values: Any) -> None:
        """Send one reply."""
        self._replies.write(json.dumps(values) + "\n")
        self._replies.flush()

    def command(self) -> int:
        """Wait for the number of steps to run now; 0 ends the run."""
        line = self._commands.readline()
        return int(line) if line else 0


class RunOnCommand(TrainerCallback):
    """Runs as many steps as it is told, reports, and waits.

    It waits where a step begins, after its batch was fetched and the step before it was logged, so that what is timed
    holds as many of each as there are steps.
    """

    def __init__(self, link: Link, tokens: list[int], trainable: list[int]) -> None:
        """`tokens`, `trainable`: real tokens (no padding) and trained ones of each step, in order."""
        self.link = link
        self.tokens, self.trainable = tokens, trainable
        self.losses: list[float] = []
        self.left = 0
        self.first_step = -1
        self.started = (0.0, 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the loss of every step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Report when enough steps were run, then wait for the next command."""
        if self.left == 0:
            self._report(state.global_step)
            self.left = self.link.command()
            if self.left == 0:
                # Trainer looks at the flags only after a step: this is the way out that costs none.
                raise Finished
            self.first_step = state.global_step
            synchronize()
            self.started = (time.perf_counter(), time.process_time())
        self.left -= 1
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rows ended with the last command."""
        self._report(state.global_step)

    def _report(self, step: int) -> None:
        if self.first_step < 0:
            reset_peak()
            self.link.reply(ready=True)
            return
        synchronize()
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.link.reply(
            steps=step - self.first_step,
            wall_s=wall,
            cpu_s=cpu,
            tokens=sum(self.tokens[self.first_step : step]),
            trainable=sum(self.trainable[self.first_step : step]),
            losses=self.losses[self.first_step : step],
            peak_bytes=peak_bytes() - self.link.baseline,
        )


class Finished(Exception):  # noqa: N818 - not an error
    """The benchmark wants no more steps."""


def train(trainer: Any, link: Link) -> None:
    """Train until the benchmark has enough."""
    try:
        trainer.train()
    except Finished:
        pass
    except torch.OutOfMemoryError as error:
        link.reply(out_of_memory=str(error).splitlines()[0])


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Forget the peak so far: loading and preparing are not the step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of resident memory cannot be reset here: it includes the loading", flush=True)


def peak_bytes() -> int:
    """The most memory since `reset_peak`: the allocator's on an accelerator, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    status = _status("VmHWM")
    return status if status is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Memory in use now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return _status("VmRSS") or 0


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def common_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments that all peers share: what eft's config says in its own words."""
    return {
        "output_dir": settings["output"],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings["accumulation"],
        "max_steps": settings["max_steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": settings["device"] == "cpu",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": settings["checkpointing"],
        "torch_compile": settings["compile"],
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings["seed"],
        "dataloader_pin_memory": settings["device"] != "cpu",
    }


def load_model(settings: dict[str, Any], attention: str) -> Any:
    """The contest's weights: fp32 where all are trained, bf16 under an adapter."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if settings["lora"] else torch.float32
    return AutoModelForCausalLM.from_pretrained(settings["model"], attn_implementation=attention, dtype=dtype)


def lora_config(settings: dict[str, Any]) -> Any:
    """peft's config with the settings of eft's."""
    from peft import LoraConfig

    return LoraConfig(**settings["lora"], target_modules="all-linear", task_type="CAUSAL_LM")
