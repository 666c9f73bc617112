"""`torch_compile`: the same training as without, few graphs, names as they were, and resumed bit for bit."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from eft import run
from eft.core.records import Message
from eft.models.adapters import apply_adapter
from eft.models.compile import CompileCounts
from eft.models.generate import sample_texts
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import assert_gradients_equal, gradients_of, token_rows
from tests.functional.test_resume import Train, assert_same, train  # noqa: F401  # pytest looks for the fixture here
from tests.tiny_models import tiny_model

CAPTURE = {"torch_compile": True, "torch_compile_backend": "eager"}
"""Only traced: what the layers become is the same, and it takes a third of the time."""
LORA = {"adapter": "lora", "lora_r": 2, "lora_target_linear": True}
ROWS = token_rows(16)
HELD_OUT = token_rows(3, seed=9)


def gradients_of_step(trainer: Any) -> dict[str, Tensor]:
    """Of the first optimizer step, before clipping."""
    trainer.make_plan()
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    weight = trainer._get_num_items_in_batch(batches, trainer.args.device)
    for batch in batches:
        trainer.training_step(trainer.model, batch, weight)
    gradients = gradients_of(trainer.model)
    trainer.model.zero_grad()
    return gradients


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"torch_compile_backend": "aot_eager"},
    "LoRA": LORA,
    "checkpointing": {"gradient_checkpointing": True, "torch_compile_backend": "aot_eager"},
    "LoRA with checkpointing": {**LORA, "gradient_checkpointing": True},
    "unpacked": {"sample_packing": False, "micro_batch_size": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_without(name: str, make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    torch.compiler.reset()
    keys = {key: value for key, value in OPTIONS[name].items() if not key.startswith("torch_")}
    gradients = []
    for options in (keys, {**CAPTURE, **OPTIONS[name]}):
        config = make_config(**options)
        trainer = make_trainer(ROWS, model=apply_adapter(tiny_model("llama"), config, seed=0), config=config)
        before = CompileCounts.now().graphs
        gradients.append(gradients_of_step(trainer))
        assert (CompileCounts.now().graphs > before) == config.torch_compile
    assert_gradients_equal(gradients[1], gradients[0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_of_a_kind_share_few_graphs(family: str, make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    """Twice the layers and ten rows of different lengths: not one graph more."""
    kinds = {"gemma2": ["sliding_attention", "full_attention"]}.get(family)
    graphs = []
    for layers in (2, 4):
        torch.compiler.reset()
        start = CompileCounts.now()
        model = tiny_model(
            family, num_hidden_layers=layers, **({"layer_types": kinds * (layers // 2)} if kinds else {})
        )
        make_trainer(ROWS, model=model, config=make_config(**CAPTURE, max_steps=10, save_strategy="no")).train()
        found = CompileCounts.now().since(start)
        assert [reason for reason in found.breaks if "torch.compiler.disable" not in reason] == []
        graphs.append(found.graphs)
    # Around the attention: up to its norm, queries to values, the projection behind it, the rest; one spare.
    assert graphs[0] == graphs[1] <= 5


class ResetAt(TrainerCallback):
    """Makes torch forget its graphs, so that it must compile again."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            torch.compiler.reset()


@pytest.mark.parametrize("late", [False, True])
def test_the_run_says_what_was_compiled(
    late: bool,
    make_trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eft.callbacks.compile_report.COMPILED_BY", 4)
    console = Console(record=True, width=100, quiet=False, file=io.StringIO())
    trainer = make_trainer(ROWS, HELD_OUT, console=console, max_steps=8, val_set_size=0.1, eval_steps=6, **CAPTURE)
    if late:
        trainer.add_callback(ResetAt(5))
    with caplog.at_level(logging.INFO, "eft.callbacks"):
        trainer.train()
    assert "graph breaks after step 4" in console.export_text()
    warned = [record for record in caplog.records if "still compiling at step" in record.message]
    assert len(warned) == late, "evaluation's own graphs are no reason to warn, new ones in training are"


def test_names_are_as_they_were_and_generation_compiles_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**CAPTURE, max_steps=3, save_steps=2)
    model, tokenizer, _ = run.train(config)
    graphs = CompileCounts.now().graphs
    question: list[Message] = [{"role": "user", "content": "one two"}]
    sample_texts(model, tokenizer, [question], max_new_tokens=3, batch_size=1)
    assert CompileCounts.now().graphs == graphs
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert not [name for name in load_file(folder / "model.safetensors") if "_orig_mod" in name]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_resume_is_bit_equal(train: Train) -> None:  # noqa: F811  # the fixture
    keys = {
        **CAPTURE,
        **LORA,
        "lora_dropout": 0.1,
        "max_steps": 5,
        "evals": HELD_OUT,
        "val_set_size": 0.1,
        "eval_steps": 2,
    }
    straight = train("straight", **keys)
    train("stopped", stop=3, **keys)
    torch.compiler.reset()  # as a new process would
    assert_same(train("stopped", resume=3, **keys), straight)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor builds C++")
def test_inductor(make_config: MakeConfig, make_trainer: MakeTrainer) -> None:
    """The real backend: equal gradients, and two runs are the same bits."""
    torch.compiler.reset()
    keys = {"torch_compile": True, "max_steps": 2, "save_strategy": "no"}
    trainers = [make_trainer(ROWS, config=make_config(**options)) for options in ({}, keys, keys)]
    plain, compiled, again = (gradients_of_step(trainer) for trainer in trainers)
    assert_gradients_equal(compiled, plain)
    assert all(torch.equal(again[name], value) for name, value in compiled.items())
    assert any(not torch.equal(plain[name], value) for name, value in compiled.items()), "nothing was compiled"
