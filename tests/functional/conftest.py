"""Tiny models, rows and trainers for tests that train: everything in one warm process, seconds per test."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.trainer.trainer import EftTrainer
from tests.functional.reference import token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

MakeConfig = Callable[..., TrainConfig]
MakeTrainer = Callable[..., EftTrainer]


@pytest.fixture(scope="session", autouse=True)
def _small_heap() -> None:
    """Every `train()` collects garbage; without what the imports left there is little to walk through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of about 300 tokens."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Family to a saved model of it, whose vocabulary is the tokenizer's; made once."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"model-{family}")
            tiny_model(
                family,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of uneven length."""
    source = random.Random(0)
    words = "one two three four five hello world Rome Paris France".split()
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(24):
            question = " ".join(source.choices(words, k=source.randint(1, 8)))
            answer = " ".join(source.choices(words, k=source.randint(1, 6)))
            turns = [{"role": "user", "content": f"{question} {number}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="session")
def prepared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of token stores for the whole session."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def make_config(
    tmp_path: Path, model_folder: Callable[[str], Path], rows_file: Path, prepared_path: Path
) -> MakeConfig:
    """Keys to a config: a tiny Llama, fp32, packed rows of 64 tokens, two bins a step; `output_dir` is `tmp_path`/out.

    `verify_saves` is off, because it starts a process.
    """

    def make(family: str = "llama", **keys: Any) -> TrainConfig:
        values = {
            "base_model": str(model_folder(family)),
            "datasets": [{"path": str(rows_file), "type": "chat_template"}],
            "dataset_prepared_path": str(prepared_path),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 64,
            "sample_packing": True,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "bf16": False,
            "verify_saves": "never",
        }
        return config_from_mapping({**values, **keys})

    return make


@pytest.fixture
def make_trainer(make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast) -> MakeTrainer:
    """A trainer as the builder makes it, over token rows and a tiny model: no file is read. `keys` are config keys."""

    def make(
        rows: Any = None,
        evals: Any = None,
        *,
        model: PreTrainedModel | None = None,
        config: TrainConfig | None = None,
        trainer_class: type[EftTrainer] = EftTrainer,
        builder_class: type[HFCausalTrainerBuilder] = HFCausalTrainerBuilder,
        total_num_steps: int | None = None,
        console: Any = None,
        **keys: Any,
    ) -> EftTrainer:
        config = config if config is not None else make_config(**keys)
        builder = builder_class(config, tiny_model("llama") if model is None else model, tokenizer)
        builder.trainer_class = trainer_class
        builder.console = console
        builder.train_dataset = token_rows(12) if rows is None else rows
        builder.eval_dataset = evals
        return builder.build(total_num_steps)

    return make
