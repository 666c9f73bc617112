"""Several held-out sets, each with its name: a loss of its own for each, from a run over a mixture with shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eft import run
from tests.functional.conftest import MakeConfig


def write(path: Path, count: int, word: str) -> dict[str, Any]:
    turns = [
        [{"role": "user", "content": f"{word} {index}?"}, {"role": "assistant", "content": f"{word} one {index}."}]
        for index in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return {"path": str(path), "type": "chat_template"}


def test_each_held_out_set_has_its_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        datasets=[
            {**write(tmp_path / "a.jsonl", 12, "hello"), "token_share": 0.75},
            write(tmp_path / "b.jsonl", 12, "world"),
        ],
        test_datasets=[
            {**write(tmp_path / "c.jsonl", 2, "three"), "name": "law"},
            write(tmp_path / "code.jsonl", 3, "four"),
        ],
        epoch_tokens=600,
        num_epochs=1,
    )
    _, _, trainer = run.train(config)
    losses = {name: value for row in trainer.state.log_history for name, value in row.items() if name.endswith("_loss")}
    assert losses.keys() >= {"eval_law_loss", "eval_code_loss"}
    assert losses["eval_law_loss"] != losses["eval_code_loss"]
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    first, second = (source for source in ledger["sources"] if source["split"] == "train")
    tokens = [source["trainable"] + source["context"] for source in (first, second)]
    assert abs(tokens[0] - 450) < 40
    assert abs(tokens[1] - 150) < 40
    assert first["repeated"]["rows"] > 0
    assert second["dropped"]["not_drawn"]["rows"] > 0
    assert {gate["status"] for gate in ledger["gates"]} <= {"pass", "not applicable"}
    promises = json.loads((tmp_path / "out" / "promises.json").read_text())
    assert {promise["status"] for promise in promises if promise["promise"] in ("E5", "E8")} == {"pass"}
