"""docs/families.md is complete, and what it says is still so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eft.models.attention import BoundarySupport, install_attention
from tests.families.oracle import measure
from tests.families.page import COMMAND, PAGE, Verdict, read, render, versions
from tests.tiny_models import tiny_model

COVER = (
    # native: plain, soft-capped, sinks, chunks, experts, latent heads, windows; and by attention of its own
    *("llama", "gemma2", "gpt_oss", "llama4_text", "qwen3_moe", "deepseek_v3", "modernbert-decoder", "gptj"),
    # prebuilt mask, and refused: by position codes, alibi, ranked tokens, compressed tokens
    *("falcon", "biogpt", "roberta", "bloom", "deepseek_v32", "doge", "minimax_m3_vl_text", "deepseek_v4"),
    # state-space models and hybrids
    *("mamba2", "jamba", "bamba", "falcon_h1", "lfm2", "qwen3_next", "recurrent_gemma", "zamba2", "nemotron_h"),
    # not constructed
    "reformer",
)
KERNELS = ("causal_conv1d", "mamba_ssm", "fla")
"""Packages with which some families can tell documents apart that cannot without."""


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    return read(PAGE.read_text(encoding="utf-8"))


def audited(names: list[str]) -> list[Verdict]:
    """Rows of these families, by the audit in a process of its own (it forks)."""
    command = [sys.executable, "-m", "tests.families.audit", "--only", ",".join(names)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
    rows = [Verdict(**json.loads(line)) for line in done.stdout.splitlines()]
    assert len(rows) == len(names), done.stderr
    return rows


def differences(rows: list[Verdict], table: dict[str, dict[str, str]]) -> list[str]:
    """What the page says otherwise, and what the oracle holds against the product."""
    found = [f"{row.family}: {fault}" for row in rows for fault in row.faults]
    if any(find_spec(name) is not None for name in KERNELS):
        return found  # the page was made without them
    for row in rows:
        entry = table[row.family]
        if (row.verdict, row.how or "–") != (entry["verdict"], entry["how"]):
            found.append(f"{row.family}: {row.verdict} {row.how}, but the page says {entry['verdict']} {entry['how']}")
    return found


def test_the_page_names_every_family_of_the_installed_transformers(table: dict[str, dict[str, str]]) -> None:
    known, listed = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), set(table)
    advice = f"run `{COMMAND}`, read the new rows, commit docs/families.md"
    assert listed == known, f"missing {sorted(known - listed)}, gone {sorted(listed - known)}: {advice}"
    made_with = versions(PAGE.read_text(encoding="utf-8"))
    assert made_with == transformers.__version__, f"made with transformers {made_with}: {advice}"
    packed = [row for row in table.values() if row["verdict"] in ("native", "mask")]
    tried = [row for row in table.values() if row["verdict"] != "not constructed"]
    assert len(tried) >= 180, "families that can be built small"
    assert len(packed) >= 110, "families that can be packed"


def test_a_cover_of_families_still_behaves_as_the_page_says(table: dict[str, dict[str, str]]) -> None:
    assert {row["verdict"] for row in table.values()} == {table[name]["verdict"] for name in COVER}
    assert differences(audited(list(COVER)), table) == []


@pytest.mark.slow
def test_every_family_behaves_as_the_page_says(table: dict[str, dict[str, str]]) -> None:
    assert differences(audited(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)), table) == []


def test_the_page_is_read_as_it_was_written() -> None:
    rows = [
        Verdict("b", "BForCausalLM", "refused", "", float("nan"), 0.5, 0.0, "a | b\nc", []),
        Verdict("a", "AForCausalLM", "native", "eft attention", 0.0, 3e-7, 2e-7, "", []),
    ]
    page = render(rows)
    assert versions(page) == transformers.__version__
    assert list(read(page)) == ["a", "b"]
    assert read(page)["a"]["how"] == "eft attention"
    assert read(page)["b"]["leak"] == "–"


def _blind(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object
) -> object:
    return sdpa_attention_forward(module, query, key, value, None, scaling=kwargs["scaling"])


def test_the_oracle_sees_a_planted_leak_and_its_absence() -> None:
    AttentionInterface.register("test_oracle_blind", _blind)
    AttentionMaskInterface.register("test_oracle_blind", lambda *args, **kwargs: None)
    stock = tiny_model("llama")
    for name, leaks in (("test_oracle_blind", True), ("eft", False)):
        model = tiny_model("llama")
        install_attention(model, name)
        stock.zero_grad()
        truth = measure(model, stock, BoundarySupport("native", "assumed", 0.0, 0.0))
        assert (truth.leak > 1e-3) == (truth.difference > 1e-3) == (truth.gradient > 1e-3) == leaks, truth
        assert truth.visible > 1e-3
    assert torch.is_grad_enabled()
