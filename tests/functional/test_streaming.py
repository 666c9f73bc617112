"""Training on a stream: to the step that the budget gives, with a ledger at the end, and bit-equal after a stop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from eft import run
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError
from eft.data.ledger import Ledger
from eft.data.stream_plan import StreamPlan
from eft.verify.verification import assemble
from tests.functional.conftest import MakeConfig

STREAM = {
    "streaming": True,
    "streaming_token_budget": 9 * 2 * 64 - 5,
    "streaming_multipack_buffer_size": 7,
    "num_epochs": 1,
    "save_strategy": "no",
    "logging_steps": 2,
    "adapter": "lora",
    "lora_target_linear": True,
    "lora_dropout": 0.1,
}
STEPS = 9
TIMES = ("time", "tokens_per_second", "trained_tokens_per_second")


@pytest.fixture
def sources(rows_file: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Two data sets, one of several files."""
    lines = rows_file.read_text().splitlines(keepends=True)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        (folder / f"part-{number}.jsonl").write_text("".join(lines[number * 4 : number * 4 + 4]))
    (tmp_path / "more.jsonl").write_text("".join(lines[12:]))
    return [{"path": str(path), "type": "chat_template"} for path in (folder, tmp_path / "more.jsonl")]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_a_run_over_a_stream_from_start_to_end(
    make_config: MakeConfig, sources: list[dict[str, Any]], tmp_path: Path, rows_file: Path
) -> None:
    test = tmp_path / "held-out.jsonl"
    test.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    held_out = [{"path": str(test), "type": "chat_template"}]
    config = make_config(datasets=sources, test_datasets=held_out, eval_steps=4, **STREAM)
    shown: dict[str, str] = {}
    _, _, trainer = run.train(config, on_start=lambda rows, _: shown.update(rows))
    assert shown["steps"] == str(STEPS)
    assert shown["budget"] == f"{STEPS * 2 * 64:,} tokens of capacity"
    assert "shards" in shown["stream"]
    assert trainer.state.global_step == STEPS
    assert isinstance(trainer.plan, StreamPlan)
    folder = tmp_path / "out"
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["total_steps"], plan["decided_by"]) == (STEPS, "streaming_token_budget")
    ledger = Ledger.from_json(json.loads((folder / "ledger.json").read_text()))
    ledger.check()
    assert [source.split for source in ledger.sources] == ["train", "train", "eval"]
    rows = rows_of(folder)
    trained = ledger.of("train")
    assert sum(source.trainable for source in trained) == [row for row in rows if "loss" in row][-1]["trained_tokens"]
    assert trained[0].rounds >= 1
    assert trained[0].dropped["held_out_duplicate"].rows >= 3, "held-out rows are never trained"
    assert {row["step"] for row in rows if "eval_loss" in row} == {4, 8, 9}
    promises = json.loads((folder / "promises.json").read_text())
    assert {promise["promise"]: promise["status"] for promise in promises}.items() >= {
        "E5": "pass",
        "E7": "pass",
        "E8": "pass",
    }.items()


class Interrupt(TrainerCallback):
    """What Ctrl-C does, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train_interrupted(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build = run.HFCausalTrainerBuilder.build

    def interrupted(builder: Any, total: int | None = None) -> Any:
        trainer = build(builder, total)
        trainer.callback_handler.callbacks.insert(0, Interrupt(step))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(run.HFCausalTrainerBuilder, "build", interrupted)
        run.train(config)


def test_a_stopped_run_goes_on_bit_for_bit(
    make_config: MakeConfig, sources: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make_config(datasets=sources, output_dir=str(tmp_path / "straight"), **STREAM)
    run.train(straight)
    weights = load_file(tmp_path / "straight" / "adapter_model.safetensors")
    ledger = json.loads((tmp_path / "straight" / "ledger.json").read_text())
    for stop in (1, 5, 8):
        folder = tmp_path / f"stopped-{stop}"
        config = make_config(datasets=sources, output_dir=str(folder), **STREAM)
        train_interrupted(config, stop, monkeypatch)
        assert json.loads((folder / f"checkpoint-{stop}" / "progress.json").read_text())["data"]["ledger"]
        _, _, trainer = run.train(config)
        assert trainer.state.global_step == STEPS
        resumed = load_file(folder / "adapter_model.safetensors")
        assert resumed.keys() == weights.keys()
        assert all(torch.equal(resumed[name], value) for name, value in weights.items()), stop
        assert rows_of(folder) == rows_of(tmp_path / "straight"), stop
        assert json.loads((folder / "ledger.json").read_text()) == ledger, stop


def test_verify_takes_no_stream(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="streaming: `eft verify` takes data that are known as a whole"):
        assemble(make_config(**STREAM), tmp_path)
