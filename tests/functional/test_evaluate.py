"""`eft evaluate` and `eft chat` load what a run left behind: the numbers are those that the run saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from eft import inputs, run
from eft.config.load import config_from_mapping
from eft.core.errors import ConfigError, ModelError
from eft.evaluate import evaluate_model, load_trained

ADAPTERS = {
    "full": {},
    "lora": {"adapter": "lora", "lora_r": 4, "lora_target_linear": True},
    # Rows of the embedding that the base's files do not have.
    "lora with a new token": {
        "adapter": "lora",
        "lora_r": 4,
        "lora_target_linear": True,
        "tokens": ["<|new|>"],
        "lora_modules_to_save": ["embed_tokens", "lm_head"],
    },
}


@pytest.fixture(scope="module")
def keys(model_folder: Callable[[str], Path], rows_file: Path, prepared_path: Path) -> dict[str, Any]:
    return {
        "base_model": str(model_folder("llama")),
        "datasets": [{"path": str(rows_file), "type": "chat_template"}],
        "val_set_size": 6,
        "sequence_len": 96,
        "sample_packing": True,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "eval_on_start": True,
        "bf16": False,
        "dataset_prepared_path": str(prepared_path),
        "verify_saves": "never",
        "save_strategy": "no",
    }


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_losses_are_those_of_the_run(keys: dict[str, Any], kind: str, tmp_path: Path) -> None:
    config = config_from_mapping({**keys, **ADAPTERS[kind], "output_dir": str(tmp_path / "out")})
    run.train(config)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_first"]
    assert evaluate_model(config)["eval_loss"] == pytest.approx(summary["eval_loss_first"], rel=1e-6)
    assert evaluate_model(config, str(tmp_path / "out"))["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-6)
    trained = load_trained(config, inputs.prepare_tokenizer(config), str(tmp_path / "out"))
    assert isinstance(trained, PeftModel) == (kind != "full")


def test_what_is_missing_is_named(keys: dict[str, Any], tmp_path: Path) -> None:
    config = config_from_mapping(keys)
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        evaluate_model(config, str(tmp_path / "nowhere"))
    without = {key: value for key, value in keys.items() if key not in ("val_set_size", "eval_on_start")}
    with pytest.raises(ConfigError, match="needs held-out data"):
        evaluate_model(config_from_mapping(without))


def test_no_tracker_hears_of_it(keys: dict[str, Any], tmp_path: Path) -> None:
    """Evaluating would otherwise start a run there."""
    pytest.importorskip("mlflow", reason="the mlflow extra is not installed")
    store = tmp_path / "mlruns"
    evaluate_model(config_from_mapping({**keys, "use_mlflow": True, "mlflow_tracking_uri": store.as_uri()}))
    assert not store.exists()
