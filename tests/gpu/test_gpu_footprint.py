"""What `eft plan` foretells of one process against what CUDA's allocator counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eft import inputs
from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.data.store import as_token_dataset
from eft.footprint import footprint
from tests.functional.reference import token_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.gpu
_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}


@pytest.mark.parametrize(("hidden", "layers", "length"), [(512, 8, 2048), (1024, 4, 1024), (1024, 8, 4096)])
def test_never_below_the_peak_and_within_three_hundredths(
    hidden: int, layers: int, length: int, tmp_path: Path
) -> None:
    model = tiny_model(
        "llama", vocab_size=16384, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, **_HEADS
    )
    model.save_pretrained(tmp_path)
    config = config_from_mapping(
        {
            "base_model": str(tmp_path),
            "datasets": [{"path": "given"}],
            "output_dir": str(tmp_path / "out"),
            "sequence_len": length,
            "sample_packing": True,
            "global_batch_size": 1,
            "max_steps": 6,
            "learning_rate": 1e-4,
            "bf16": True,
            "save_strategy": "no",
            "preflight": False,
        }
    )
    rows = token_rows(100, longest=length // 4)
    predicted = footprint(config, inputs.plan_of(config, as_token_dataset(rows), 1), 1).peak
    builder = HFCausalTrainerBuilder(config, model, tiny_tokenizer())
    builder.train_dataset = rows
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    builder.build().train()
    measured = torch.cuda.max_memory_allocated() - before
    assert 1.0 <= predicted / measured <= 1.03, (predicted, measured)
