"""The auxiliary loss of experts over ranks (D11): by document, averaged by token share over the whole global batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.training import differences, settings, train


@pytest.mark.parametrize("keys", [{}, {"fsdp_version": 2}], ids=["DDP", "FSDP2"])
def test_the_auxiliary_loss_of_experts_is_that_of_one_process(
    keys: dict[str, object], two: Ranks, tmp_path: Path
) -> None:
    coefficient = {"router_aux_loss_coef": 0.5}
    alone = train(0, "qwen3_moe", settings(tmp_path / "one", **coefficient))
    without = train(0, "qwen3_moe", settings(tmp_path / "without"))
    got = two.run(train, "qwen3_moe", settings(tmp_path / "two", **coefficient, **keys))
    assert differences(got[0], alone) == []
    # The test can tell: ten times the tolerance of a step at least.
    assert max(abs(a - b) for a, b in zip(alone.norms, without.norms, strict=True)) > 1e-3
    assert differences(without, alone) != []
