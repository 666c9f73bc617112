"""E6: what was saved is what was trained. COMPLETE re-reads every tensor, VERIFIED asks a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from eft.core.constants import MANIFEST_NAME
from eft.core.errors import PromiseBroken
from eft.core.hashing import hash_file
from eft.core.records import PromiseResult
from eft.models.load import base_dtype
from eft.models.plain import (
    adapter_state,
    base_state,
    id_of,
    live_adapter_state,
    plain_instance,
    probe_logits,
    tensor_digest,
)
from eft.models.quantised import quantisation_facts

VERIFIED = "VERIFIED: a fresh process with plain from_pretrained gives the live logits"
LOADED = "VERIFIED: a fresh process with plain from_pretrained loads the live tensors"
CHILD_TIMEOUT_S = 3600
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_saved_tensors(folder: Path, model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PromiseResult:
    """E6 COMPLETE: the manifest's checksums hold, and every tensor on disk is byte-equal to the live one in `dtype`.

    Read one tensor at a time. Every live tensor must be there, except a name tied to one that is; every trained
    parameter must be in the files. A tensor that its family keeps in fp32 may be fp32 on disk.
    """
    title = "COMPLETE: every tensor on disk equals the live one"
    problems = manifest_problems(folder)
    checked = 0
    if not problems:
        expected = _expected_state(folder, model)
        problems, seen = _compare_files(folder, expected, dtype)
        checked = len(seen)
        problems += _missing(expected, seen) + _left_out(model, seen)
    detail = "; ".join(problems[:3]) if problems else f"{checked} tensors read back, all byte-equal"
    return PromiseResult("E6", title, "fail" if problems else "pass", detail, {"tensors": float(checked)})


def manifest_problems(folder: Path) -> list[str]:
    """What contradicts `manifest.json`: missing files, other sizes or checksums. Empty when all is well."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return [f"{path} is missing, so the export was never finished"]
    problems = []
    for name, facts in json.loads(path.read_text())["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != facts["size"]:
            problems.append(f"{file} has {file.stat().st_size} bytes, the manifest says {facts['size']}")
        elif hash_file(file) != facts["sha256"]:
            problems.append(f"{file} was changed after it was written (sha256 differs)")
    return problems


def _tensor_files(folder: Path) -> list[Path]:
    names = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    return [folder / name for name in sorted(names) if name.endswith(".safetensors")]


def _expected_state(folder: Path, model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Live tensors under the names that the files use."""
    on_disk: set[str] = set()
    for file in _tensor_files(folder):
        with safe_open(file, framework="pt") as tensors:
            on_disk.update(tensors.keys())
    if isinstance(model, PeftModel):
        plain = adapter_state(model, with_embeddings=False)
        return plain if on_disk <= plain.keys() else adapter_state(model, with_embeddings=True)
    live = base_state(model)
    if on_disk <= live.keys():
        return live
    # Families that transformers holds in another layout than their files (fused experts): map back as a save does.
    return dict(revert_weight_conversion(model, dict(live)))


def _compare_files(folder: Path, expected: dict[str, Tensor], dtype: torch.dtype) -> tuple[list[str], set[str]]:
    problems: list[str] = []
    seen: set[str] = set()
    for file in _tensor_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # safetensors' file cannot be iterated
                if name not in expected:
                    problems.append(f"{file.name}: {name} is not in the live model")
                    continue
                seen.add(name)
                if not _byte_equal(tensors.get_tensor(name), expected[name], dtype):
                    problems.append(f"{file.name}: {name} differs from the live tensor")
    return problems, seen


def _byte_equal(saved: Tensor, live: Tensor, dtype: torch.dtype) -> bool:
    wanted = dtype if live.is_floating_point() else live.dtype
    if saved.dtype != wanted and not (saved.dtype == torch.float32 and live.is_floating_point()):
        return False
    cast = live.to(saved.dtype).contiguous()
    return saved.shape == cast.shape and torch.equal(saved.contiguous().view(torch.uint8), cast.view(torch.uint8))


def _missing(expected: dict[str, Tensor], seen: set[str]) -> list[str]:
    there = {id_of(expected[name]) for name in seen}
    return [f"{name} was not saved" for name, tensor in expected.items() if id_of(tensor) not in there]


def _left_out(model: PreTrainedModel | PeftModel, seen: set[str]) -> list[str]:
    """Trained parameters outside the files: an adapter export cannot carry weights of the base."""
    if not isinstance(model, PeftModel):
        return []
    state = live_adapter_state(model, with_embeddings=True)
    there = {id_of(state[name]) for name in seen if name in state}
    return [
        f"{name} was trained but is not part of the export"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id_of(parameter) not in there
    ]


@dataclass(frozen=True)
class Probe:
    """What a saved model must answer: taken from the live one at a moment, compared at any later one."""

    ids: list[int]
    """The document."""
    logits: Tensor
    """[tokens, vocabulary], of a plain instance of the live weights, in the dtype of the files, on the CPU."""
    encoded: list[int]
    """What the tokenizer makes of the text that it decodes `ids` to."""
    seconds: float
    """That it took."""

    def check(self, folder: Path) -> PromiseResult:
        """E6 VERIFIED of the save in `folder`, whose manifest is there: asks a fresh process."""
        started = time.monotonic()
        child, error = _run_child(folder, self.ids)
        if child is None:
            return PromiseResult("E6", VERIFIED, "fail", f"plain transformers could not load {folder}: {error}")
        seconds = self.seconds + time.monotonic() - started
        numbers = {
            "tokens": float(len(self.ids)),
            "seconds": round(seconds, 1),
            "process_peak_mib": float(child["peak_mib"]),
        }
        logits = child["logits"]
        if logits.shape != self.logits.shape:
            detail = f"logits have shape {list(logits.shape)}, the live model's {list(self.logits.shape)}"
            return PromiseResult("E6", VERIFIED, "fail", detail, numbers)
        difference = float((logits.float() - self.logits.float()).abs().max())
        numbers |= {"max_abs_difference": difference, "max_abs_logit": float(self.logits.float().abs().max())}
        if not torch.equal(logits, self.logits):
            return PromiseResult("E6", VERIFIED, "fail", f"logits differ by up to {difference:.3g}", numbers)
        if "tokens" in child and child["tokens"].tolist() != self.encoded:
            return PromiseResult("E6", VERIFIED, "fail", "the saved tokenizer encodes the probe differently", numbers)
        return PromiseResult("E6", VERIFIED, "pass", f"logits of {len(self.ids)} tokens are bit-equal", numbers)


def take_probe(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], dtype: torch.dtype
) -> Probe:
    """The live model's logits on the document `ids`, as files in `dtype` must give them.

    From a plain second instance holding the live weights, on the CPU with as many threads as the fresh process gets, so
    that bit-equality can be expected.
    """
    started = time.monotonic()
    weights_dtype = base_dtype(model) if isinstance(model, PeftModel) else dtype
    logits = probe_logits(plain_instance(model, weights_dtype, adapter_dtype=dtype), ids)
    encoded = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)
    return Probe(ids, logits, encoded, time.monotonic() - started)


def verify_export(
    folder: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> PromiseResult:
    """E6 VERIFIED: plain transformers, in a fresh process, gives the live weights' logits on the document `ids`.

    Not applicable to an adapter whose base exists only in memory.
    """
    problems = manifest_problems(folder)
    if problems:
        return PromiseResult("E6", VERIFIED, "fail", "; ".join(problems[:3]))
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if isinstance(model, PeftModel) and manifest["base_model"] is None:
        return PromiseResult("E6", VERIFIED, "not applicable", "the adapter's base model was never loaded from files")
    return take_probe(model, tokenizer, ids, getattr(torch, manifest["dtype"])).check(folder)


def probe_save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    *,
    gguf_file: str | None = None,
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """For `verify_saves: always`: what the manifest of a checkpoint of `model` must say so that it can be loaded, and
    the check of the written folder, which raises PromiseBroken where plain transformers finds another model in it.

    The checkpoint's weights are read as fp32, which holds all dtypes of a live model exactly. Nothing is checked of an
    adapter that peft alone cannot load: with trained weights of the base beside it, over a base with added rows or one
    that exists in memory only.
    """
    facts = _facts_to_load(model, gguf_file)
    if isinstance(model, PeftModel):
        base = facts["base_model"]
        if base is None or _base_has_changed(model, base, gguf_file):
            return facts, lambda folder: None
    probe = take_probe(model, tokenizer, ids, torch.float32)
    return facts, partial(_keep_if_it_passes, probe.check)


def digest_save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    *,
    live: Callable[[nn.Module], dict[str, dict[str, Tensor]]],
    whole: Callable[[str, Tensor], Tensor],
    gguf_file: str | None = None,
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """`probe_save` of a model of which each process holds a part: no process has the weights to compute logits with, so
    what a fresh process has loaded is compared tensor by tensor, by SHA-256. One tensor is whole at a time.

    Every process calls it; the first one asks for the check. Nothing is checked of an adapter that peft alone cannot
    load: with trained weights of the base beside it, or over one that exists in memory only.

    Args:
        live: file name to tensors of what a checkpoint stores.
        whole: gathers a tensor of that name, a collective.
    """
    facts = _facts_to_load(model, gguf_file)
    files = live(model)
    expected = {name: tensor_digest(whole(name, tensor)) for part in files.values() for name, tensor in part.items()}
    if isinstance(model, PeftModel) and (facts["base_model"] is None or len(files) > 1):
        return facts, lambda folder: None
    return facts, partial(_keep_if_it_passes, partial(check_digests, expected=expected))


def check_digests(folder: Path, expected: dict[str, str]) -> PromiseResult:
    """E6 VERIFIED of the save in `folder`: a fresh process loads tensors of these digests (`tensor_digest`)."""
    child, error = _run_child(folder, [])
    if child is None:
        return PromiseResult("E6", LOADED, "fail", f"plain transformers could not load {folder}: {error}")
    numbers = {"tensors": float(len(expected)), "process_peak_mib": float(child.pop("peak_mib"))}
    loaded = {name: bytes(digest.tolist()).hex() for name, digest in child.items()}
    # A second name of a tied tensor is loaded, but not stored.
    known = set(expected.values())
    wrong = sorted({name for name in expected if loaded.get(name) != expected[name]})
    wrong += sorted(name for name in loaded.keys() - expected.keys() if loaded[name] not in known)
    detail = f"{len(wrong)} of {len(expected)} tensors differ: {', '.join(wrong[:3])}" if wrong else "all equal"
    return PromiseResult("E6", LOADED, "fail" if wrong else "pass", detail, numbers)


def _facts_to_load(model: PreTrainedModel | PeftModel, gguf_file: str | None) -> dict[str, Any]:
    """What the manifest of a checkpoint must say beside its files."""
    facts: dict[str, Any] = {
        "dtype": "float32",
        "vocabulary_rows": int(model.get_input_embeddings().weight.shape[0]),
        "base_model": None,
    }
    if isinstance(model, PeftModel):
        revision = model.peft_config[model.active_adapter].revision
        base = model.get_base_model().config.name_or_path or None
        facts |= {"base_model": base, "gguf_file": gguf_file, "revision": revision}
        facts["quantization"] = quantisation_facts(model.get_base_model())
    return facts


def _keep_if_it_passes(check: Callable[[Path], PromiseResult], folder: Path) -> None:
    result = check(folder)
    if result.status == "fail":
        raise PromiseBroken(f"{result.promise} {result.title}: {result.detail}. {folder.name} was not kept.")


def _base_has_changed(model: PeftModel, base: str, gguf_file: str | None) -> bool:
    """Whether the base in memory is not that of its files, beside what the adapter covers."""
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    rows = AutoConfig.from_pretrained(base, **options).get_text_config().vocab_size
    covered = {id_of(tensor) for tensor in live_adapter_state(model, with_embeddings=False).values()}
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return bool(rows != model.get_input_embeddings().weight.shape[0]) or any(id_of(p) not in covered for p in trained)


def _run_child(folder: Path, ids: list[int]) -> tuple[dict[str, Tensor] | None, str]:
    """The fresh process's tensors (`verify_child`), or None and the end of what it printed."""
    threads = str(torch.get_num_threads())
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
    # One document on the CPU: there the last bits depend on the thread count, and the GPU is full of training state.
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "logits.safetensors")
        command = [sys.executable, "-m", "eft.models.verify_child", str(folder), ",".join(map(str, ids)), str(out)]
        try:
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return None, f"no answer within {CHILD_TIMEOUT_S} s"
        if run.returncode != 0:
            return None, " ".join(run.stderr.strip().splitlines()[-2:])
        return load_file(out), ""
