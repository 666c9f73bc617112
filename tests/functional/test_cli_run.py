"""The commands of a run as a user types them: what they print, what they leave, how they fail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eft.cli.app import main

Eft = Callable[..., tuple[int, str, str]]


@pytest.fixture
def eft(capsys: pytest.CaptureFixture[str]) -> Eft:
    """Run `eft …` in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        # rich folds lines at the width of the console.
        return code, out, " ".join(err.split())

    return call


@pytest.fixture
def config(tmp_path: Path, model_folder: Callable[[str], Path], rows_file: Path, prepared_path: Path) -> Path:
    """A run.yaml of a short run on the tiny model."""
    keys: dict[str, Any] = {
        "base_model": str(model_folder("llama")),
        "datasets": [{"path": str(rows_file), "type": "chat_template"}],
        "val_set_size": 4,
        "dataset_prepared_path": str(prepared_path),
        "sequence_len": 96,
        "sample_packing": True,
        "max_steps": 4,
        "learning_rate": 0.001,
        "bf16": False,
        "verify_saves": "never",
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_train_leaves_what_it_says(eft: Eft, config: Path, tmp_path: Path) -> None:
    code, out, _ = eft("train", config, "generate_samples=true", "generation_max_new_tokens=4")
    assert code == 0
    for text in ("Token ledger", "parameters", "steps", "fill", "step 4/4", "held-out loss", "After the run"):
        assert text in out
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left >= {
        "config.yaml", "plan.json", "ledger.json", "metrics.jsonl", "samples.jsonl", "promises.json", "summary.json",
        "report.html", "model.safetensors", "config.json", "tokenizer.json", "manifest.json", "checkpoint-4",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert "run.yaml:" in (tmp_path / "out" / "config.yaml").read_text(), "values carry their origin"


def test_a_finished_run_is_not_touched_without_overwrite(eft: Eft, config: Path, tmp_path: Path) -> None:
    assert eft("train", config, "--no-report")[0] == 0
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    code, out, _ = eft("train", config)
    assert code == 0, "a supervisor may start the same command for ever"
    assert len(out.splitlines()) == 1
    assert "this run is finished" in out
    code, _, err = eft("train", config, "learning_rate=0.5")
    assert code == 2
    assert "holds a finished run" in err
    assert "--overwrite" in err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert eft("train", config, "--overwrite", "--no-report")[0] == 0


def test_an_unfinished_run_of_another_config_is_shown_as_a_difference(eft: Eft, config: Path, tmp_path: Path) -> None:
    assert eft("train", config, "--no-report")[0] == 0
    record = tmp_path / "out" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    code, _, err = eft("train", config, "learning_rate=0.002")
    assert code == 2
    assert "learning_rate: 0.001 → 0.002" in err


def test_a_foreign_folder_is_refused(eft: Eft, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, err = eft("train", config, "--overwrite")
    assert code == 2
    assert "thesis.tex" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(eft: Eft, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    code, _, err = eft("train", config)
    assert code == 2
    assert "cannot be written" in err


def test_a_file_in_place_of_the_folder_is_refused(eft: Eft, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    code, _, err = eft("train", config)
    assert code == 2
    assert "is a file; a folder is needed" in err


@pytest.mark.parametrize(
    ("rows", "override", "message"),
    [
        ("", None, "rows.jsonl"),
        ('{"messages": [{"role": "user", "content": "x"}]\n', None, "line 1"),
        ('{"mesages": []}\n', None, "messages"),
        ('{"messages": [{"role": "usr", "content": "x"}]}\n', None, "user"),
        ('{"messages": [{"role": "user", "content": "hello"}]}\n', None, "trainable"),
    ],
    ids=["empty", "broken JSON", "misspelt field", "unknown role", "nothing to train"],
)
def test_a_bad_data_set_is_one_message(
    eft: Eft, config: Path, tmp_path: Path, rows: str, override: str | None, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    code, _, err = eft("train", config, f"datasets.0.path={path}", "val_set_size=0")
    assert code == 2
    assert err.startswith("error: ")
    assert "rows.jsonl" in err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("checkpoint-*"))


def test_a_missing_file_names_the_nearest(eft: Eft, config: Path, rows_file: Path) -> None:
    code, _, err = eft("train", config, f"datasets.0.path={rows_file.with_name('row.jsonl')}")
    assert code == 2
    assert "row.jsonl" in err
    assert "rows.jsonl" in err


def test_malformed_rows_are_counted_drops_when_asked(eft: Eft, config: Path, tmp_path: Path, rows_file: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_file.read_text() + '{"messages": "none"}\n')
    assert eft("train", config, f"datasets.0.path={path}", "malformed_rows=drop", "--no-report")[0] == 0
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["sources"][0]["dropped"]["malformed"]["rows"] == 1


def test_plan_counts_without_a_model(eft: Eft, config: Path) -> None:
    code, out, _ = eft("plan", config, "--json", "max_steps=null", "num_epochs=2")
    assert code == 0
    plan = json.loads(out)
    one = json.loads(eft("plan", config, "--json", "--world-size", 3, "max_steps=null", "num_epochs=2")[1])
    assert plan["total_steps"] == sum(epoch["steps_executed"] for epoch in plan["epochs"])
    assert one["global_batch_size"] == 3 * plan["global_batch_size"]
    assert plan["balance"] is None
    assert 0 <= one["balance"]["least_idle"] <= one["balance"]["idle"] < 1
    wide = eft("plan", config, "--world-size", 2, "num_epochs=2", "balance_buffer_steps=2")[1]
    assert "ranks wait for the slowest of 2" in " ".join(wide.split())
    assert plan["saves"] == plan["evaluations"] == [epoch["steps"] * (i + 1) for i, epoch in enumerate(plan["epochs"])]
    text = eft("plan", config)[1]
    assert "learning rate by step" in text
    assert "tokens per step" in text


@pytest.mark.parametrize(
    ("family", "words"),
    [("qwen3_moe", "at its fullest"), ("bloom", "not estimated: BloomForCausalLM without its numbers")],
)
def test_plan_tells_the_memory_of_each_process_or_why_not(
    family: str, words: str, eft: Eft, config: Path, model_folder: Callable[[str], Path]
) -> None:
    code, out, _ = eft("plan", config, "--world-size", 2, f"base_model={model_folder(family)}", "sample_packing=false")
    assert code == 0
    assert words in " ".join(out.split())


def test_preprocess_shows_what_is_trained(eft: Eft, config: Path) -> None:
    code, out, _ = eft("preprocess", config, "--show", 1)
    assert code == 0
    assert "Token ledger" in out
    assert "Data gates" in out
    assert " trained\n" in out
    assert "<|im_start|>assistant\n«" in out


def test_evaluate_chat_and_report_on_a_finished_run(eft: Eft, config: Path, tmp_path: Path) -> None:
    assert eft("train", config, "--no-report")[0] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    code, out, _ = eft("evaluate", config, "--model", tmp_path / "out")
    assert code == 0
    assert f"{summary['eval_loss']:.5f}"[:-1] in out
    code, out, _ = eft("chat", config, "--prompt", "hello", "--max-new-tokens", 3)
    assert code == 0
    assert out.strip()
    assert eft("report", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert eft("report", tmp_path / "nowhere")[0] == 2


def test_a_report_is_not_written_among_other_files(eft: Eft, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    code, _, err = eft("report", tmp_path)
    assert code == 2
    assert "holds no run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_conversation_ends_with_the_input(eft: Eft, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = yaml.safe_load(config.read_text())
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))  # no line end: what a pipe or Ctrl-D leaves
    code, out, err = eft("chat", config, "--model", keys["base_model"], "--max-new-tokens", 3)
    assert code == 0
    assert out.count("model ›") == 1
    assert "Aborted" not in err


@pytest.mark.parametrize(("steps", "text"), [(1, "warm-up 1 step ·"), (9, "the run ends before it does")])
def test_a_warm_up_longer_than_the_run_is_told(eft: Eft, config: Path, steps: int, text: str) -> None:
    code, out, _ = eft("plan", config, f"warmup_steps={steps}")
    assert code == 0
    assert text.rstrip(" ·") in " ".join(out.split())
    assert ("the run ends" in out) == (steps == 9)


def test_two_processes_that_nobody_launched_are_refused(
    eft: Eft, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    code, _, err = eft("train", config)
    assert code == 2
    assert "WORLD_SIZE says 2 processes" in err
    assert "eft train --nproc 2" in err


def test_sigterm_finishes_the_step_and_the_same_command_continues(eft: Eft, config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**settings, "max_steps": 400, "save_strategy": "no", "val_set_size": 0}))
    metrics = tmp_path / "out" / "metrics.jsonl"
    command = [sys.executable, "-c", "from eft.cli.app import main; main()", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "stopped by SIGTERM after step" in out
    assert "the same command continues" in out
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 < step < 400
    assert not (tmp_path / "out" / "model.safetensors").exists(), "an interrupted run exports nothing"
    code, out, _ = eft("train", config, "--no-report")
    assert code == 0
    assert f"from checkpoint-{step}" in out
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 401)), "each step once"
