"""`verify_saves: always` where every process holds a part: a fresh process loads each checkpoint, tensor for tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes

from eft.models import verify_export
from eft.models.verify_child import main as verify_child
from eft.runtime import draft as drafts
from eft.runtime.checkpoint import verify_manifest
from eft.verify.ranks import as_rank
from tests.distributed.ranks import Ranks, forget_devices
from tests.distributed.training import build, settings
from tests.tiny_models import tiny_model

KEYS: dict[str, Any] = {
    "fsdp_version": 2,
    "verify_saves": "always",
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
    # Loading sets the default dtype for a moment: harmless in a process of its own, not in a thread of this one.
    "save_asynchronously": False,
}


def save(rank: int, kind: str, keys: dict[str, Any], base: str, is_faulty: bool = False) -> list[str]:
    """Train two steps; names of the folders that the fresh process, which is this one, was asked to load."""
    asked: list[str] = []

    def run_child(folder: Path, ids: list[int]) -> tuple[dict[str, Tensor] | None, str]:
        asked.append(folder.name)
        out = Path(base, f"child-{len(asked)}.safetensors")
        verify_child(folder, ids, out)
        return load_file(out), ""

    write = drafts.save_tensors

    def write_other(path: Path, tensors: Mapping[str, Tensor]) -> None:
        write(path, {name: tensor + 1e-3 * ("q_proj" in name) for name, tensor in tensors.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_export, "_run_child", run_child)
        if is_faulty:
            patch.setattr(drafts, "save_tensors", write_other)
        trainer = build(kind, keys)
        if isinstance(trainer.model, PeftModel):
            trainer.model.get_base_model().config.name_or_path = base
        trainer.train()
    return asked


@pytest.mark.parametrize(
    "kind", ["llama", "llama lora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama tied", "qwen3_moe"))]
)
def test_every_checkpoint_is_loaded(kind: str, two: Ranks, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    answers = two.run(save, kind, settings(tmp_path / "out", **KEYS), str(base))
    assert [len(asked) for asked in answers] == [2, 0], "the first process asks"
    for step in (1, 2):
        assert verify_manifest(tmp_path / "out" / f"checkpoint-{step}")["dtype"] == "float32"


def faulty_rank(rank: int, keys: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    forget_devices()
    with as_rank(rank, 2, Path(folder, "meeting")):
        save(rank, "llama", keys, folder, is_faulty=True)


def test_one_that_differs_is_not_kept(tmp_path: Path) -> None:
    """What is read back from the disk equals what was written, but that was not the live state."""
    keys = settings(tmp_path / "out", **KEYS)
    with pytest.raises(ProcessException) as caught:
        start_processes(faulty_rank, (keys, str(tmp_path)), 2, start_method="fork")
    message = str(caught.value).strip().splitlines()[-1]
    assert "PromiseBroken: E6 VERIFIED" in message
    assert "2 of 21 tensors differ: model.layers.0.self_attn.q_proj.weight" in message
    assert not list((tmp_path / "out").glob("checkpoint-*"))
