"""Peak first: every phase is tried, what does not fit is named with the cheapest setting that does, nothing changes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn

from eft import run as eft_run
from eft.core.atomic import TEMPORARY_MARK
from eft.core.errors import ConfigError
from eft.data.batches import BatchSource
from eft.optim.state_size import optimizer_state_bytes
from eft.preflight.callback import Preflight
from eft.runtime.memory import Peak
from eft.runtime.rng import capture_rng
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model

ROWS = token_rows(24)
LIMITLESS = 1 << 40


class CountedMemory:
    """A gauge that counts what autograd saves, and 4 KiB per token of a forward pass: the same on every machine."""

    def __init__(self, trainer: EftTrainer, limit: int = LIMITLESS) -> None:
        self.trainer = trainer
        self.limit = limit
        self.needed: list[int] = []
        """Of every measurement."""
        self.held: list[int] = []

    def available(self) -> int:
        return self.limit

    @contextmanager
    def measured(self, budget: int, model: nn.Module) -> Iterator[Peak]:
        peak, most = Peak(), [0]
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor.detach()

        def begin(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            most.append(sum(saved.values()))  # of the pass before
            saved.clear()
            saved[0] = 4096 * inputs[0].numel()

        handle = self.trainer.model.get_input_embeddings().register_forward_hook(begin)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield peak
        handle.remove()
        peak.num_bytes = max(*most, sum(saved.values()))
        self.needed.append(peak.num_bytes)

    def holding(self, num_bytes: int) -> AbstractContextManager[None]:
        self.held.append(num_bytes)
        return nullcontext()

    def clean(self) -> None: ...


def preflight_of(trainer: EftTrainer, limit: int = LIMITLESS) -> tuple[Preflight, CountedMemory]:
    """The trainer's preflight, with a counted limit."""
    (preflight,) = [found for found in trainer.callback_handler.callbacks if isinstance(found, Preflight)]
    memory = CountedMemory(trainer, limit)
    preflight.gauge = memory
    return preflight, memory


def lora_model() -> Any:
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "down_proj"])
    return get_peft_model(tiny_model("llama"), adapter)


RUNS: dict[str, dict[str, Any]] = {
    "dropout, accumulation, evaluations": {
        "lora": True,
        "evals": True,
        "val_set_size": 0.1,
        "eval_steps": 1,
        "eval_on_start": True,
    },
    "one micro-batch, updates in the backward pass": {
        "gradient_accumulation_steps": 1,
        "optimizer_in_backward": True,
        "max_grad_norm": 0,
    },
    "averaged weights": {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant_with_warmup", "evals": True},
    "recomputation": {"gradient_checkpointing": True, "lora": True},
    "two bins a micro-batch, unpacked": {"micro_batch_size": 2, "sample_packing": False},
}


def run(make_trainer: MakeTrainer, preflight: bool, lora: bool = False, evals: bool = False, **keys: Any) -> EftTrainer:
    settings = {"max_steps": 4, "save_steps": 2, "preflight": preflight, **keys}
    model = lora_model() if lora else tiny_model("llama")
    return make_trainer(ROWS, token_rows(5, seed=1) if evals else None, model=model, **settings)


def outcome(trainer: EftTrainer, checkpoint: str | None = None) -> tuple[dict[str, Tensor], list[Any], dict[str, Any]]:
    """Weights, logged numbers that do not depend on time, and the generators after the training."""
    trainer.train(resume_from_checkpoint=checkpoint)
    names = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "eval_loss")
    logged = [{name: row[name] for name in names if name in row} for row in trainer.state.log_history]
    generators = capture_rng()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return {**weights, **generators.tensors}, logged, generators.plain


def assert_equal(left: Any, right: Any) -> None:
    assert left[0].keys() == right[0].keys()
    assert [name for name in left[0] if not torch.equal(left[0][name], right[0][name])] == []
    assert left[1:] == right[1:]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_with_and_without(name: str, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    expected = outcome(run(make_trainer, False, **RUNS[name]))
    assert not (tmp_path / "out" / "memory.json").exists()
    with_preflight = run(make_trainer, True, **RUNS[name])
    _, memory = preflight_of(with_preflight)
    measured = outcome(with_preflight)
    assert memory.needed
    assert (tmp_path / "out" / "memory.json").exists()
    assert_equal(measured, expected)


@pytest.mark.parametrize("name", ["dropout, accumulation, evaluations", "averaged weights"])
def test_a_resumed_run_is_the_same_too(name: str, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    expected = outcome(run(make_trainer, False, **RUNS[name]))
    resumed = run(make_trainer, True, **RUNS[name])
    _, memory = preflight_of(resumed)
    assert_equal(outcome(resumed, str(tmp_path / "out" / "checkpoint-2")), expected)
    assert memory.held[0] < 1000, "the optimizer's state is there already, but for counters"


def test_what_a_forward_pass_leaves_in_the_model_is_put_back(make_trainer: MakeTrainer) -> None:
    """Dynamic RoPE grows its table with the longest row so far, and keeps it."""
    rows = sorted(token_rows(6, longest=60), key=lambda row: len(row["input_ids"]))
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    keys: dict[str, Any] = {"sample_packing": False, "curriculum_sampling": True, "num_epochs": 1.0}
    results = []
    for preflight in (False, True):
        model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
        trainer = make_trainer(rows, model=model, preflight=preflight, save_strategy="no", **keys)
        results.append(outcome(trainer))
        assert model.model.rotary_emb.max_seq_len_cached == len(rows[-1]["input_ids"])
    assert_equal(results[1], results[0])


def test_the_costliest_micro_batch_is_tried(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    trainer = run(make_trainer, True, evals=True, num_epochs=2.0, max_steps=None)
    preflight, memory = preflight_of(trainer)
    preflight.console = console
    trainer.train()
    source = trainer.parts.packing
    assert isinstance(source, BatchSource)
    plan: Any = trainer.plan
    written = json.loads((tmp_path / "out" / "memory.json").read_text())
    step, evaluation, save = (written["phases"][name] for name in ("training step", "evaluation", "save"))
    bins = [ids for number in range(plan.total_steps) for ids in plan.step(number).bins]
    tokens = [sum(len(ROWS[index]["input_ids"]) for index in ids) for ids in bins]
    assert step["tokens"] >= 0.9 * max(tokens), "quadratic cost may choose another than the longest"
    assert step["needed"] == memory.needed[0] + written["optimizer_state"]
    assert evaluation["step"] is None
    assert written["optimizer_state"] == optimizer_state_bytes(trainer.parts.optimizer, trainer.model)
    assert written["gradients"] == 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    files = (tmp_path / "out" / f"checkpoint-{plan.total_steps}").iterdir()
    saved = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    assert save["bytes"] == pytest.approx(saved, rel=0.1)
    assert not list((tmp_path / "out").glob(f"{TEMPORARY_MARK}*"))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert [line.split(":")[1] for line in text.splitlines()] == [" training step", " evaluation", " save"]


def refused(trainer: EftTrainer) -> str:
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    return str(error.value)


def test_smaller_micro_batches_are_the_cheapest_setting(make_trainer: MakeTrainer) -> None:
    keys: dict[str, Any] = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = run(make_trainer, True, **keys)
    _, memory = preflight_of(trainer)
    trainer.train()
    whole = memory.needed[0] + memory.held[0]
    trainer = run(make_trainer, True, **keys)
    _, memory = preflight_of(trainer, whole - 1)
    message = refused(trainer)
    assert "preflight: the training step does not fit: it needs" in message
    assert "4 bins" in message
    assert "fits: `micro_batch_size: 2`, `gradient_accumulation_steps: 2` (" in message
    _, memory = preflight_of(trainer, 2 * whole // 5)
    assert "fits: `micro_batch_size: 1`, `gradient_accumulation_steps: 4` (" in refused(trainer)


def test_the_advice_fits(make_trainer: MakeTrainer) -> None:
    trainer = run(make_trainer, True)
    _, memory = preflight_of(trainer)
    trainer.train()
    limit = memory.needed[0] + memory.held[0] - 1
    trainer = run(make_trainer, True)
    preflight_of(trainer, limit)
    message = refused(trainer)
    assert "fits: `gradient_checkpointing: true`, `gradient_checkpointing_every: 2` (" in message
    trainer = run(make_trainer, True, gradient_checkpointing=True, gradient_checkpointing_every=2)
    preflight_of(trainer, limit)
    trainer.train()
    assert trainer.state.global_step == 4


def test_shorter_rows_are_the_last_resort(make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=400)
    keys: dict[str, Any] = {"sequence_len": 512, "gradient_checkpointing": True, "max_steps": 2, "save_strategy": "no"}
    trainer = make_trainer(rows, preflight=True, **keys)
    _, memory = preflight_of(trainer)
    trainer.train()
    trainer = make_trainer(rows, preflight=True, **keys)
    preflight_of(trainer, int(0.7 * memory.needed[0]) + memory.held[0])
    assert "fits: `sequence_len: 256` (" in refused(trainer)
    trainer = make_trainer(rows, preflight=True, **keys)
    preflight_of(trainer, memory.held[0])
    message = refused(trainer)
    assert "Nothing that was tried fits, not even `sequence_len: 128`; the optimizer's state alone takes" in message
    assert "`adapter: lora`" in message


def test_updates_in_the_backward_pass_are_not_traded_for_accumulation(make_trainer: MakeTrainer) -> None:
    keys = {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 1, "micro_batch_size": 2}
    trainer = run(make_trainer, True, **keys)
    _, memory = preflight_of(trainer)
    trainer.train()
    trainer = run(make_trainer, True, **keys)
    preflight_of(trainer, memory.needed[0] + memory.held[0] - 1)
    assert "fits: `gradient_checkpointing: true`, `gradient_checkpointing_every" in refused(trainer)


def test_an_allocation_that_fails_is_no_crash(make_trainer: MakeTrainer) -> None:
    """As on an accelerator: the limit shows as an error in the middle of the work."""
    trainer = run(make_trainer, True)
    preflight, _ = preflight_of(trainer)
    attempts = []

    class Failing(CountedMemory):
        @contextmanager
        def measured(self, budget: int, model: nn.Module) -> Iterator[Peak]:
            with super().measured(budget, model) as peak:
                attempts.append(budget)
                if len(attempts) < 3:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield peak

    preflight.gauge = Failing(trainer, LIMITLESS)
    message = refused(trainer)
    assert "it needs more than the" in message
    assert "fits: `gradient_checkpointing: true` (" in message
    assert attempts == [LIMITLESS - memory_held for memory_held in preflight.gauge.held[:3]]


def test_an_evaluation_that_does_not_fit(make_trainer: MakeTrainer) -> None:
    def trainer_of(limit: int) -> tuple[EftTrainer, CountedMemory]:
        evals = token_rows(40, longest=60, seed=1)
        trainer = make_trainer(ROWS, evals, preflight=True, max_steps=1, eval_batch_size=8, val_set_size=0.1)
        return trainer, preflight_of(trainer, limit)[1]

    trainer, memory = trainer_of(LIMITLESS)
    trainer.train()
    # What autograd saves makes the training step the larger one, so take it out of the comparison.
    tokens_of_step, tokens_of_evaluation = memory.needed
    trainer, memory = trainer_of(LIMITLESS)
    preflight, _ = preflight_of(trainer)

    class EvaluationOnly(CountedMemory):
        def available(self) -> int:
            return LIMITLESS if not self.needed else tokens_of_evaluation + self.held[0] - 1

    preflight.gauge = EvaluationOnly(trainer)
    message = refused(trainer)
    assert message.startswith("preflight: the evaluation does not fit: it needs")
    assert "8 bins" in message
    assert "fits: `eval_batch_size: 4` (" in message
    assert tokens_of_step > 0


@pytest.mark.parametrize(
    ("share", "advice"),
    [
        (2.6, "Set `save_total_limit: 1`, or"),
        (1.6, "Set `save_only_model: true`, `save_total_limit: 2`, or"),
        (0.7, "Set `save_strategy: no`, or"),
        (0.1, "Free some, or"),
    ],
)
def test_saves_that_do_not_fit(share: float, advice: str, make_trainer: MakeTrainer) -> None:
    """In units of one checkpoint: AdamW's is a third weights; four saves and the export take 4 + 1/3."""
    trainer = make_trainer(ROWS, preflight=True, max_steps=4, save_steps=1)
    preflight, _ = preflight_of(trainer)
    weights = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    preflight.free_disk = lambda path: int(share * 3 * weights)
    message = refused(trainer)
    assert message.startswith("preflight: the saves do not fit. 4 checkpoints of")
    assert advice in message
    assert "choose another `output_dir`" in message


def test_a_save_that_fails_is_told_before_the_first_step(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(ROWS, preflight=True, max_steps=1)
    preflight_of(trainer)
    (tmp_path / "out").mkdir(exist_ok=True)
    # Stands in for a quota or a file system that refuses writes, which a superuser does not see.
    trainer.model.config.save_pretrained = refuse  # type: ignore[method-assign, union-attr]
    assert "preflight: a save into" in refused(trainer)


def refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError("Disk quota exceeded")


def test_real_memory_is_enough_for_a_tiny_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = run(make_trainer, True, evals=True)
    trainer.train()
    phases = json.loads((tmp_path / "out" / "memory.json").read_text())["phases"]
    assert all(0 <= phase["needed"] < phase["available"] for phase in phases.values())
    assert phases["training step"]["available"] > 1 << 27


def test_a_whole_run_shows_what_it_needs(make_config: MakeConfig, tmp_path: Path) -> None:
    shown: dict[str, str] = {}
    config = make_config(max_steps=2, preflight=True, val_set_size=3)
    _, _, trainer = eft_run.train(config, on_start=lambda rows, meta: shown.update(rows))
    size = 4 * sum(parameter.numel() for parameter in trainer.model.parameters()) / 2**20
    expected = f"weights {size:.1f} MiB · gradients {size:.1f} MiB · optimizer state {2 * size:.1f} MiB"
    assert shown["memory"].startswith(expected)
    phases = json.loads((tmp_path / "out" / "memory.json").read_text())["phases"]
    assert list(phases) == ["training step", "evaluation", "save"]


def test_auto_is_off_on_the_cpu(make_trainer: MakeTrainer) -> None:
    trainer = run(make_trainer, "auto")  # type: ignore[arg-type]  # the key's third value
    assert not [found for found in trainer.callback_handler.callbacks if isinstance(found, Preflight)]
