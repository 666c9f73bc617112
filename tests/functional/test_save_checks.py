"""E6 while training: a save that cannot work is found before the first step; with `always`, every one is tried."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eft import run
from eft.core.errors import PromiseBroken
from eft.models import verify_export, verify_start
from eft.models.export import export_model
from eft.models.verify_child import main as verify_child
from eft.runtime import draft as drafts
from eft.runtime.checkpoint import CheckpointStore, verify_manifest
from tests.functional.conftest import MakeConfig

LORA = {"adapter": "lora", "lora_r": 2, "lora_target_linear": True, "lora_dropout": 0.1}
Children = list[str]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Children]:
    """The fresh process is this one, which need not import for ten seconds; names of what it was asked to load.

    While a model is loaded, transformers puts a function of its own in place of `PreTrainedModel.tie_weights`. A thread
    that loads beside this one would leave that there: no model of a later test would be tied. So they take turns.
    """
    asked: Children = []
    plain, load, turn = PreTrainedModel.tie_weights, PreTrainedModel.from_pretrained.__func__, threading.RLock()

    def load_in_turn(cls: type[PreTrainedModel], *arguments: Any, **keywords: Any) -> Any:
        with turn:
            return load(cls, *arguments, **keywords)

    monkeypatch.setattr(PreTrainedModel, "tie_weights", plain)  # and so it is for the tests after this one
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load_in_turn))

    def run_child(folder: Path, ids: list[int]) -> tuple[dict[str, Tensor] | None, str]:
        asked.append(folder.name)
        out = tmp_path / f"child-{len(asked)}.safetensors"
        try:
            verify_child(folder, ids, out)
        except Exception as error:
            return None, repr(error)
        return load_file(out), ""

    monkeypatch.setattr(verify_export, "_run_child", run_child)
    yield asked
    assert PreTrainedModel.tie_weights is plain


def saves_of(out: Path) -> list[dict[str, Any]]:
    return [row for row in json.loads((out / "promises.json").read_text()) if row["promise"] == "E6"]


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_a_save_is_tried_before_the_first_step(
    keys: dict[str, Any], make_config: MakeConfig, tmp_path: Path, children: Children
) -> None:
    run.train(make_config(max_steps=3, verify_saves="ends", **keys))
    out = tmp_path / "out"
    rows = saves_of(out)
    assert [row["status"] for row in rows] == ["pass"] * 3
    assert verify_start.TITLE in [row["title"] for row in rows]
    first = next(row for row in rows if row["title"] == verify_start.TITLE)
    assert first["numbers"]["process_peak_mib"] > 100
    assert {"blocked_seconds", "seconds"} <= first["numbers"].keys()
    assert sorted(children) == [".tmp-rehearsal", "out"]
    assert not list(out.glob(".tmp-*"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["save_verify_seconds"] == 0
    lines = [json.loads(line) for line in (out / "saves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3]


def test_a_resumed_run_does_not_try_again(make_config: MakeConfig, tmp_path: Path, children: Children) -> None:
    run.train(make_config(max_steps=4, save_steps=2, verify_saves="never"))
    folder = tmp_path / "out"
    (folder / "run.json").write_text((folder / "run.json").read_text().replace("finished", "interrupted"))
    run.train(make_config(max_steps=4, save_steps=2, verify_saves="ends"))
    assert children == ["out"]


def altered(folder: Path) -> None:
    """As if the save itself had gone wrong: everything fits but the weights."""
    file = next(folder.glob("*model.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_rehearsed_save_that_differs_ends_the_run(
    make_config: MakeConfig, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COMPLETE fails at once, before any step."""

    def export_and_alter(model: Any, tokenizer: Any, folder: Path, **options: Any) -> dict[str, Any]:
        manifest = export_model(model, tokenizer, folder, **options)
        altered(folder)
        return manifest

    monkeypatch.setattr(verify_start, "export_model", export_and_alter)
    with pytest.raises(PromiseBroken, match="a save before the first step.*changed after it was written"):
        run.train(make_config(max_steps=3, verify_saves="ends"))
    assert children == []
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_a_rehearsed_save_that_cannot_be_loaded_ends_the_run_in_its_first_steps(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_export, "_run_child", lambda folder, ids: (None, "planted"))
    with pytest.raises(PromiseBroken, match="a save before the first step.*could not load.*planted"):
        run.train(make_config(max_steps=200, save_steps=1000, verify_saves="ends"))
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) < 150, "long before the end"


ALWAYS: dict[str, dict[str, Any]] = {
    "full, beside the steps": {"save_asynchronously": True},
    "full": {"save_asynchronously": False},
    "lora": {"save_asynchronously": False, **LORA},
    "partly frozen": {"save_asynchronously": False, "train_top_layers": 1, "bf16": True},
}


@pytest.mark.parametrize("kind", ALWAYS)
def test_always_verifies_every_checkpoint(
    kind: str,
    make_config: MakeConfig,
    model_folder: Any,
    tmp_path: Path,
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over a bf16 base whose trained part is fp32: the checkpoint holds both exactly, and is compared in fp32."""
    # Loading sets the default dtype for a moment: harmless in a process of its own, not in a thread of this one.
    monkeypatch.setattr(CheckpointStore, "beside", lambda self, job: job())
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(base)
    run.train(make_config(base_model=str(base), max_steps=4, save_steps=2, verify_saves="always", **ALWAYS[kind]))
    out = tmp_path / "out"
    assert len(children) == 4
    assert sum("checkpoint" in name for name in children) == 2
    for step in (2, 4):
        assert verify_manifest(out / f"checkpoint-{step}")["dtype"] == "float32"
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["save_verify_seconds"] <= summary["save_write_seconds"]


def test_always_keeps_no_checkpoint_that_differs(
    make_config: MakeConfig, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights on the disk are read back equal to what was written, but that was not the live state."""
    copy: Callable[..., Tensor] = drafts.TensorCopies._copy
    calls: list[str] = []

    def wrong_copy(self: Any, key: tuple[str, str], tensor: Tensor) -> Tensor:
        copied = copy(self, key, tensor)
        if key[1].endswith("layers.0.self_attn.q_proj.weight"):
            calls.append(key[1])
            if len(calls) > 1:
                copied += 1e-3
        return copied

    monkeypatch.setattr(drafts.TensorCopies, "_copy", wrong_copy)
    with pytest.raises(PromiseBroken, match=r"VERIFIED.*logits differ.*was not kept"):
        run.train(make_config(max_steps=6, save_steps=2, verify_saves="always"))
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(out.glob(".tmp-checkpoint*"))


def test_the_first_process_s_verification_counts_as_blocked_only_for_the_live_side(
    make_config: MakeConfig, tmp_path: Path, children: Children
) -> None:
    run.train(make_config(max_steps=2, save_steps=1, verify_saves="always"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "saves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["verify_s"] <= line["write_s"] and 0 < line["blocked_s"] <= line["write_s"] for line in lines)
