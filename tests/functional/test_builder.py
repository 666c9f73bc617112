"""The contract of HFCausalTrainerBuilder and of the trainer that it builds."""

from __future__ import annotations

import importlib.util
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.trainer_utils import TrainOutput

from eft import run
from eft.builder import HFCausalTrainerBuilder
from eft.core.errors import ConfigError, DataError, ModelError
from eft.optim.schedulers import learning_rates
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeConfig, MakeTrainer
from tests.functional.reference import model_of, record_samples, token_rows
from tests.tiny_models import tiny_model

ROWS = token_rows(10)
HELD_OUT = token_rows(4, seed=9)


class DictDefault(dict):  # type: ignore[type-arg]
    """A mutable mapping that gives None for a missing key, also as an attribute, as users' own code has."""

    def __missing__(self, key: str) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.fixture
def mapping(make_config: MakeConfig) -> DictDefault:
    config = make_config(sample_packing=False, num_epochs=2, learning_rate=1e-2)
    return DictDefault(config.model_dump(mode="json", exclude_unset=True))


def logged(trainer: EftTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_the_program_of_the_contract(mapping: DictDefault, tokenizer: PreTrainedTokenizerFast) -> None:
    """A mapping as config, a number of steps, data assigned after `build`."""
    mapping["val_set_size"] = 0.1
    model = tiny_model("llama")
    builder = HFCausalTrainerBuilder(mapping, model, tokenizer)
    trainer = builder.build(total_num_steps=7)
    trainer.train_dataset = ROWS
    trainer.eval_dataset = HELD_OUT
    result = trainer.train(resume_from_checkpoint=mapping.resume_from_checkpoint)
    assert isinstance(result, TrainOutput)
    assert result.global_step == 7
    losses = logged(trainer, "loss")
    assert len(losses) == 7
    assert result.training_loss == pytest.approx(sum(losses) / 7, rel=1e-6)
    assert result.metrics["train_loss"] == result.training_loss
    assert result.metrics["train_runtime"] > 0
    assert losses[-1] < losses[0]
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [5, 7]


def test_training_loss_with_sparse_logging(make_trainer: MakeTrainer) -> None:
    """The mean over all steps, not over the logged rows."""
    every = make_trainer(ROWS, max_steps=7, save_strategy="no").train().training_loss
    third = make_trainer(ROWS, max_steps=7, save_strategy="no", logging_steps=3).train().training_loss
    assert third == pytest.approx(every, rel=1e-6)


def test_held_out_data_that_the_config_does_not_speak_of(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ROWS, sample_packing=False, num_epochs=1, save_strategy="no")
    trainer.eval_dataset = HELD_OUT
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 1


def test_reassigned_data_get_a_plan_of_their_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ROWS, sample_packing=False, num_epochs=1)
    before = trainer.make_plan()
    assert before.total_steps == 5
    trainer.train_dataset = token_rows(16, seed=4)
    assert trainer.train().global_step == 8
    assert trainer.make_plan().fingerprint != before.fingerprint


def test_a_plain_data_set_is_the_same_as_rows(make_trainer: MakeTrainer) -> None:
    """`datasets.Dataset` with `input_ids` and `labels`, with a column more."""
    plain = datasets.Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"])} for row in ROWS])
    runs = [make_trainer(rows, max_steps=3, save_strategy="no") for rows in (ROWS, plain)]
    recorder = record_samples(runs[1], ROWS)
    for trainer in runs:
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert len(recorder.steps(2)) == 3


def test_data_that_cannot_be_trained_on(make_trainer: MakeTrainer) -> None:
    with pytest.raises(DataError, match="'labels'"):
        make_trainer([{"input_ids": [1, 2]}]).train()
    with pytest.raises(DataError, match="empty"):
        make_trainer([]).train()


def test_a_processor_is_refused_by_name(mapping: DictDefault, tokenizer: PreTrainedTokenizerFast) -> None:
    class VisionProcessor:
        pass

    with pytest.raises(ModelError, match="VisionProcessor has no image processor"):
        HFCausalTrainerBuilder(mapping, tiny_model("llama"), tokenizer, VisionProcessor())  # type: ignore[arg-type]


def test_setup_trainer_routes_here(mapping: DictDefault, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = run.setup_trainer(mapping, ROWS, HELD_OUT, tiny_model("llama"), tokenizer, None, 3)
    assert isinstance(trainer, EftTrainer)
    assert trainer.train().global_step == 3
    assert len(logged(trainer, "eval_loss")) == 1


def test_setup_trainer_refuses_reinforcement_learning(mapping: DictDefault, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="rl: dpo .*supervised fine-tuning only"):
        run.setup_trainer(DictDefault({**mapping, "rl": "dpo"}), ROWS, None, tiny_model("llama"), tokenizer)
    with pytest.raises(ConfigError, match="model_ref"):
        run.setup_trainer(
            mapping, ROWS, None, tiny_model("llama"), tokenizer, model_ref=tiny_model("llama"), peft_config=None
        )


def test_a_foreign_peft_model_is_trained_as_it_is(make_trainer: MakeTrainer) -> None:
    """Made, wrapped and given eager attention elsewhere; the config has no `adapter`."""
    model = model_of("foreign peft")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(ROWS, model=model, max_steps=3)
    assert trainer.train().global_step == 3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert trainer.model is model


def test_an_adapter_in_the_config_needs_a_wrapped_model(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ModelError, match="adapter: lora is set, but the model.*LlamaForCausalLM"):
        make_trainer(ROWS, adapter="lora", lora_target_linear=True)


def test_packing_is_refused_where_documents_cannot_be_kept_apart(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ModelError, match=r"sample_packing: BloomForCausalLM.*`sample_packing: false`"):
        make_trainer(ROWS, model=tiny_model("bloom"))


def test_a_wrong_mapping_is_refused(mapping: DictDefault, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        HFCausalTrainerBuilder({**mapping, "learning_rat": 1e-3}, tiny_model("llama"), tokenizer)


def test_a_second_training_starts_a_new_schedule(make_trainer: MakeTrainer) -> None:
    trainer: Any = make_trainer(ROWS, max_steps=4, save_strategy="no")
    expected = learning_rates(trainer.parts.scheduler.args[0], 4)
    first = trainer.train()
    assert logged(trainer, "learning_rate") == expected
    second = trainer.train()
    assert second.global_step == 4
    assert logged(trainer, "learning_rate") == expected
    assert second.training_loss < first.training_loss
    assert trainer.totals["tokens"] == logged(trainer, "tokens")[-1]


def test_the_same_seed_twice_gives_the_same_weights(make_trainer: MakeTrainer) -> None:
    runs = [make_trainer(ROWS, model=tiny_model("llama", attention_dropout=0.1), max_steps=3) for _ in range(2)]
    for number, trainer in enumerate(runs):
        torch.manual_seed(number)  # what the caller drew before must not matter
        trainer.train()
    states = [trainer.model.state_dict() for trainer in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = make_trainer(ROWS, model=tiny_model("llama", attention_dropout=0.1), max_steps=3, seed=7)
    other.train()
    assert logged(other, "loss") != logged(runs[0], "loss")


def test_a_tracker_without_its_package_is_named(
    mapping: DictDefault, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(
        "eft.trainer.training_args.find_spec",
        lambda name: None if name in ("wandb", "sqlalchemy") else importlib.util.find_spec(name),
    )
    for key, message in (("use_wandb", "needs the package wandb"), ("use_mlflow", "Set `mlflow_tracking_uri`")):
        with pytest.raises(ConfigError, match=message):
            HFCausalTrainerBuilder({**mapping, key: True}, tiny_model("llama"), tokenizer).build()
