"""Programs written against Axolotl's SFT API, as written, on eft (`compat/axolotl`, DESIGN D14)."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import setup_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import eft
from eft.core.errors import ConfigError, ModelError, PromiseBroken
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

ROWS = 40
HELD_OUT = 6


@dataclass(frozen=True)
class Place:
    """A model, rows and the keys of a run over them."""

    folder: Path
    keys: dict[str, Any]

    def keys_for(self, name: str, **changes: Any) -> dict[str, Any]:
        """The keys of a run that writes into the folder `name`."""
        return {**self.keys, "output_dir": str(self.folder / name), **changes}

    def yaml_for(self, name: str, **changes: Any) -> Path:
        """The same as a file; YAML takes JSON values."""
        path = self.folder / f"{name}.yaml"
        keys = self.keys_for(name, **changes)
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
        return path

    def model(self) -> Any:
        """The base model, loaded as a program without eft would."""
        return AutoModelForCausalLM.from_pretrained(self.keys["base_model"])

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(self.keys["base_model"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("compat")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), bos_token_id=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": f"{2 * i}."}]}
        for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(
        folder,
        {
            "base_model": str(folder / "base"),
            "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
            "val_set_size": HELD_OUT,
            "sequence_len": 96,
            "sample_packing": True,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "num_epochs": 2,
            "learning_rate": 1e-3,
            "bf16": False,
            "dataset_prepared_path": str(folder / "prepared"),
            "verify_saves": "never",
        },
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the two programs ----


def run_builder_program(cfg: Any, dataset_meta: Any, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The first program of the contract, as written."""
    builder = HFCausalTrainerBuilder(cfg, model, tokenizer)
    trainer = builder.build(total_num_steps=dataset_meta.total_num_steps)
    trainer.train_dataset = dataset_meta.train_dataset
    trainer.eval_dataset = dataset_meta.eval_dataset
    train_result = trainer.train(resume_from_checkpoint=cfg.resume_from_checkpoint)
    print(f"Training loss: {train_result.training_loss}")
    return trainer, train_result


def check_builder_run(place: Place, name: str, trainer: Any, result: Any, dataset_meta: Any) -> None:
    assert type(trainer) is AxolotlTrainer
    assert result.global_step == trainer.state.global_step == dataset_meta.total_num_steps
    rows = [json.loads(line) for line in (place.folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == result.global_step
    assert result.training_loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert losses[-1] < losses[0]
    assert sum("eval_loss" in row for row in rows) == 2, "the held-out rows are evaluated at the end of each epoch"
    assert (place.folder / name / f"checkpoint-{result.global_step}" / "manifest.json").is_file()


def test_builder_program_with_a_loaded_file(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_cfg(place.yaml_for("file"))
    dataset_meta = load_datasets(cfg=cfg)
    trainer, result = run_builder_program(cfg, dataset_meta, place.model(), place.tokenizer())
    check_builder_run(place, "file", trainer, result, dataset_meta)
    assert f"Training loss: {result.training_loss}" in capsys.readouterr().out


def test_builder_program_with_a_dict_and_resume(place: Place) -> None:
    """The same in memory, then once more from a checkpoint of it: the same weights, the same loss of the whole run."""
    cfg = DictDefault(place.keys_for("dict"))
    dataset_meta = load_datasets(cfg=cfg)
    straight, result = run_builder_program(cfg, dataset_meta, place.model(), place.tokenizer())
    check_builder_run(place, "dict", straight, result, dataset_meta)

    middle = min(int(path.name.partition("-")[2]) for path in (place.folder / "dict").glob("checkpoint-*"))
    assert 0 < middle < result.global_step
    cfg = DictDefault(
        place.keys_for("dict"), resume_from_checkpoint=str(place.folder / "dict" / f"checkpoint-{middle}")
    )
    resumed, again = run_builder_program(cfg, dataset_meta, place.model(), place.tokenizer())
    assert again.training_loss == pytest.approx(result.training_loss, rel=1e-12)
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_builder_program_with_a_model_wrapped_elsewhere(place: Place) -> None:
    cfg = DictDefault(place.keys_for("wrapped", adapter="lora", lora_r=4, lora_target_modules=["q_proj", "v_proj"]))
    dataset_meta = load_datasets(cfg=cfg)
    model = get_peft_model(place.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer, result = run_builder_program(cfg, dataset_meta, model, place.tokenizer())
    check_builder_run(place, "wrapped", trainer, result, dataset_meta)


def test_an_adapter_that_the_model_lacks_is_refused(place: Place) -> None:
    cfg = DictDefault(place.keys_for("plain", adapter="lora", lora_target_linear=True))
    with pytest.raises(ModelError, match="adapter: lora is set, but the model given to the builder is a plain"):
        HFCausalTrainerBuilder(cfg, place.model(), place.tokenizer()).build()


@pytest.mark.parametrize("form", ["file", "dict"])
def test_train_program(place: Place, form: str) -> None:
    name = f"train-{form}"
    changes = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "save_dtype": "float32"}
    cfg = load_cfg(place.yaml_for(name, **changes)) if form == "file" else DictDefault(place.keys_for(name, **changes))
    dataset_meta = load_datasets(cfg=cfg)
    model, tokenizer, trainer = train(cfg=cfg, dataset_meta=dataset_meta)
    assert isinstance(model, PeftModel)
    assert tokenizer.chat_template
    assert trainer.state.global_step == dataset_meta.total_num_steps
    assert json.loads((place.folder / name / "summary.json").read_text())["exit_reason"] == "finished"
    # What is left in the folder is what the model in memory computes.
    loaded = PeftModel.from_pretrained(place.model(), place.folder / name).eval()
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-5)


# ---- the names ----


def test_the_names_are_ours() -> None:
    assert AxolotlTrainer is eft.EftTrainer
    assert importlib.metadata.version("axolotl").endswith("+eft")


def test_setup_trainer_routes_to_our_builder(place: Place) -> None:
    cfg = DictDefault(place.keys_for("routed"))
    dataset_meta = load_datasets(cfg=cfg)
    trainer = setup_trainer(
        cfg,
        dataset_meta.train_dataset,
        dataset_meta.eval_dataset,
        place.model(),
        place.tokenizer(),
        None,
        dataset_meta.total_num_steps,
        model_ref=None,
        peft_config=None,
    )
    assert type(trainer) is AxolotlTrainer
    assert trainer.train_dataset is dataset_meta.train_dataset
    assert trainer.make_plan().total_steps == dataset_meta.total_num_steps


def test_setup_trainer_refuses_reinforcement_learning(place: Place) -> None:
    cfg = DictDefault(place.keys_for("rl"), rl="dpo")
    with pytest.raises(ConfigError, match="rl: dpo asks for preference or reinforcement learning, which is not part"):
        setup_trainer(cfg, None, None, None, None, None, 1)
    with pytest.raises(ConfigError, match="model_ref: a reference model asks for preference"):
        setup_trainer(DictDefault(place.keys_for("rl")), None, None, None, None, None, 1, model_ref=place.model())


def test_a_key_that_nothing_reads_is_told_at_the_start(place: Place) -> None:
    """What the trainer is responsible for stays under E8; what the program itself loaded is the program's business."""
    cfg = DictDefault(place.keys_for("unread", stall_timeout=50))
    dataset_meta = load_datasets(cfg=cfg)
    builder = HFCausalTrainerBuilder(cfg, place.model(), place.tokenizer())
    builder.keys_of_others = builder.keys_of_others - {"stall_timeout"}
    builder.train_dataset = dataset_meta.train_dataset
    with pytest.raises(PromiseBroken, match=r"E8 effective keys.*`stall_timeout`"):
        builder.build().train()


# ---- load_cfg ----


def test_load_cfg_fills_in_defaults_and_takes_overrides(place: Place) -> None:
    path = place.yaml_for("overridden")
    cfg = load_cfg(path, learning_rate=2e-5, num_epochs=None, datasets__0__train_on_eos="last")
    assert (cfg.learning_rate, cfg.num_epochs, cfg.seed) == (2e-5, 2, 42)
    assert cfg.datasets[0].train_on_eos == "last"
    assert cfg.adapter is None
    assert load_cfg(DictDefault(place.keys_for("overridden")), learning_rate=2e-5)["learning_rate"] == 2e-5


def test_load_cfg_raises_our_errors(place: Place) -> None:
    path = place.folder / "wrong.yaml"
    path.write_text(place.yaml_for("right").read_text() + "sample_pakcing: true\ngptq: true\n")
    with pytest.raises(ConfigError) as caught:
        load_cfg(path)
    lines = len(path.read_text().splitlines())
    assert f"wrong.yaml:{lines - 1}" in str(caught.value)
    assert "did you mean `sample_packing`?" in str(caught.value)
    assert "`gptq: true`: Axolotl has this key, eft has not" in str(caught.value)


def test_a_dict_is_checked_when_it_is_used(place: Place) -> None:
    cfg = DictDefault(place.keys_for("late"))
    cfg.learning_rte = 1e-4
    with pytest.raises(ConfigError, match="did you mean `learning_rate`"):
        load_datasets(cfg=cfg)


def test_a_continued_adapter_keeps_its_dropout_unless_told(place: Place) -> None:
    keys = {"adapter": "lora", "lora_model_dir": "x"}
    assert "lora_dropout" not in load_cfg(place.yaml_for("kept", **keys))
    assert load_cfg(place.yaml_for("set", **keys, lora_dropout=0.0))["lora_dropout"] == 0.0


# ---- DictDefault ----


def test_missing_known_keys_read_as_none() -> None:
    cfg = DictDefault(base_model="x")
    assert cfg.learning_rate is None
    assert cfg["learning_rate"] is None
    assert cfg.get("learning_rate", 3) == 3
    assert "learning_rate" not in cfg
    assert cfg.rl is None, "a key that only Axolotl has"


def test_misspelt_keys_are_errors_that_name_the_nearest() -> None:
    cfg = DictDefault(base_model="x")
    with pytest.raises(AttributeError, match="'learning_rte' is no config key; did you mean 'learning_rate'"):
        _ = cfg.learning_rte
    with pytest.raises(KeyError, match="did you mean 'sequence_len'"):
        _ = cfg["sequence_length"]
    assert not hasattr(cfg, "sequence_lenn")


def test_it_is_mutable_and_wraps_what_is_inside() -> None:
    cfg = DictDefault(
        {"datasets": [{"path": "a", "roles": {"assistant": ["gpt"]}}], "special_tokens": {"pad_token": "p"}}
    )
    cfg.sequence_len = 64
    cfg["optim_args"] = {"amsgrad": True}
    assert (cfg.sequence_len, cfg["sequence_len"], cfg.optim_args.amsgrad) == (64, 64, True)
    assert cfg.datasets[0].path == "a"
    assert cfg.datasets[0].split is None
    with pytest.raises(AttributeError, match="did you mean 'split'"):
        _ = cfg.datasets[0].splitt
    assert cfg.special_tokens.eos_token is None, "names in there are the user's own"
    del cfg.sequence_len
    assert cfg.sequence_len is None
    assert cfg.setdefault("seed", 3) == cfg.seed == 3


def test_of_two_the_left_one_wins() -> None:
    left = DictDefault(learning_rate=1.0, optim_args={"amsgrad": True})
    right = {"learning_rate": 2.0, "seed": 1, "optim_args": {"amsgrad": False, "foreach": True}}
    both = left | right
    assert both == {"learning_rate": 1.0, "seed": 1, "optim_args": {"amsgrad": True, "foreach": True}}
    assert left == {"learning_rate": 1.0, "optim_args": {"amsgrad": True}}, "neither operand is changed"
    assert right["optim_args"] == {"amsgrad": False, "foreach": True}
    left |= {"learning_rate": 3.0, "optim_args": {"foreach": True}}
    assert left == {"learning_rate": 3.0, "optim_args": {"amsgrad": True, "foreach": True}}
    assert isinstance(left.optim_args, DictDefault)


def test_copies_and_plain_dicts() -> None:
    cfg = DictDefault(datasets=[{"path": "a"}])
    for twin in (copy.deepcopy(cfg), cfg.deepcopy(), pickle.loads(pickle.dumps(cfg))):
        assert type(twin) is DictDefault
        assert twin == cfg
        assert twin.datasets[0] is not cfg.datasets[0]
    assert cfg.copy().datasets[0] is cfg.datasets[0]
    plain = cfg.to_dict()
    assert type(plain) is dict
    assert type(plain["datasets"][0]) is dict
