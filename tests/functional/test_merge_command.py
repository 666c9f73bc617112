"""`eft merge` on the command line, and the merge as `eft verify` checks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from eft import run
from eft.cli import merge as command
from eft.core.errors import ConfigError, PromiseBroken
from eft.models.merge_targets import Target
from eft.verify.merged import check_merge
from eft.verify.saves import write_export
from eft.verify.verification import assemble

MakeConfig = Callable[..., Any]

app = typer.Typer()
app.command()(command.merge)
KEYS: dict[str, Any] = {"adapter": "lora", "lora_target_linear": True, "max_steps": 3, "save_strategy": "no"}


def _merge(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_command(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**KEYS)
    run.train(config)
    done = _merge(config.output_dir)
    assert done.exit_code == 0, done.output
    assert "14 of 21 tensors changed" in done.output
    assert "pass: the merged model equals base + adapter: saved in float32" in done.output
    AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "merged")
    again = _merge(config.output_dir)
    assert isinstance(again.exception, ConfigError)
    assert "--overwrite" in str(again.exception)
    assert _merge(config.output_dir, "--overwrite", "--dtype", "bfloat16").exit_code == 0
    wrong = _merge(config.output_dir, "--dtype", "int8")
    assert "--dtype: int8 is none of" in str(wrong.exception)


def test_the_command_fails_where_the_adapter_was_lost(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**KEYS)
    run.train(config)
    monkeypatch.setattr(Target, "merged", lambda self, weight: weight)
    assert isinstance(_merge(config.output_dir).exception, PromiseBroken)


@pytest.mark.parametrize("keys", [KEYS, {**KEYS, "adapter": "qlora", "load_in_4bit": True}], ids=["lora", "qlora"])
def test_verify_merges_what_it_exported(make_config: MakeConfig, tmp_path: Path, keys: dict[str, Any]) -> None:
    if "load_in_4bit" in keys:
        pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    verification = assemble(make_config(**keys), tmp_path / "verify")
    write_export(verification, tmp_path / "verify" / "export")
    results = check_merge(verification)
    assert {result.status for result in results} == {"pass"}
    assert len(results) == (2 if "load_in_4bit" in keys else 1)


def test_verify_has_nothing_to_merge_without_an_adapter(make_config: MakeConfig, tmp_path: Path) -> None:
    assert check_merge(assemble(make_config(), tmp_path)) == []
