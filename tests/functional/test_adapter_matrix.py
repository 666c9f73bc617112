"""Every kind of adapter on every kind of model: trained, audited, saved, reloaded, merged and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional.adapter_matrix import ALL, Case, run_case

COVER = [
    Case("LoRA", "Llama", True, "rows"),
    Case("LoRA", "Qwen3-MoE", False, "whole"),
    Case("QLoRA", "Llama", False, "rows"),
    Case("QLoRA", "Gemma3", True, "none"),
    Case("DoRA", "Qwen3", False, "none"),
    Case("DoRA", "Gemma3", True, "whole"),
    Case("PiSSA", "Llama", True, "rows"),
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if c in COVER else pytest.mark.slow) for c in ALL]
)
def test_cell(case: Case, tmp_path: Path) -> None:
    if case.method == "QLoRA":
        pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    promises, merged = run_case(case, tmp_path)
    broken = [promise for promise in (*promises, *merged.promises) if promise.status == "fail"]
    assert not broken
    statuses = {promise.title: promise.status for promise in promises}
    assert statuses["every trainable tensor changes, no frozen one does"] == "pass"
    assert statuses["VERIFIED: a fresh process with plain from_pretrained gives the live logits"] == "pass"
    assert {promise.status for promise in merged.promises} == {"pass"}
    assert all(change.change > 0 for change in merged.changes)
