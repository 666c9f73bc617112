"""E6 of a merge: the merged model's logits beside those of base + adapter, a decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import cpu_offload
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eft.core.records import PromiseResult
from eft.models.base_files import base_files
from eft.models.empty_base import AdapterFacts, empty_adapted, empty_base, is_empty
from eft.models.merge_targets import aliases_of, plan_merge, with_rows
from eft.models.plain import base_model_of, probe_logits, unwrapped_names
from eft.models.rounding import is_rounded
from eft.models.shards import Shards

EXACT_TOLERANCE = 1e-5
"""Largest difference of logits in fp32, merged against base + adapter, as a share of the largest logit."""
ROUNDED_TOLERANCE = 2e-2
"""After the merged weights were rounded to 16 bits: norm of the difference of logits in fp32, as a share of their norm.

Rounding SmolLM2-135M's weights so that they keep their change costs 2e-3 to 5e-3, running it in bf16 1.3e-2 to 1.7e-2;
a model of random weights, through which errors grow, 1.3e-2.
"""
QUANTISED_RATIO = 2.0
"""Over a quantised base, merging into the full one moves the logits (root mean square) as quantising did; at most this
many times as far."""
_PROBE_TOKENS = 32


class _Weights(Mapping[str, Tensor]):
    """Parameters of an empty model by name, read when they are needed."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def compare_merged(
    facts: AdapterFacts, base: Path, merged: Path, dtype: torch.dtype, ids: list[int] | None
) -> list[PromiseResult]:
    """Whether the files in `merged` compute what base + adapter do, on the document `ids`, in fp32."""
    probe = ids or [(7 * position + 3) % int(facts.rows or 2**10) for position in range(_PROBE_TOKENS)]
    adapted = adapted_logits(facts, base, probe)
    what, written = f"saved in {str(dtype).removeprefix('torch.')}", plain_logits(merged, probe)
    if dtype == torch.float32:
        results = [_exact(what, written, adapted)]
    else:
        exact = _summed_logits(facts, base, merged, probe)
        results = [
            _exact("before rounding", exact, adapted),
            _rounded(what, written, adapted, routed=_has_experts(merged)),
        ]
    if facts.quantisation is not None:
        results.append(_beside_quantised(facts, base, merged, probe))
    return results


def _has_experts(folder: Path) -> bool:
    return any(".experts." in name for name in Shards(folder).file_of)


def _exact(what: str, found: Tensor, wanted: Tensor) -> PromiseResult:
    """The largest difference, as a share of the largest logit."""
    difference, scale = float((found - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    detail = f"logits differ by up to {difference / scale:.2g} of the largest (limit {EXACT_TOLERANCE:.0e}) in fp32"
    return _judged(what, difference / scale <= EXACT_TOLERANCE, detail, found, wanted)


def _rounded(what: str, found: Tensor, wanted: Tensor, *, routed: bool) -> PromiseResult:
    """The norm of the difference beside that of the logits.

    Every logit moves a little, and the largest of millions tells more of the model than of the merge. `routed`:
    rounding may send a token on the border to another expert, so the median token counts.
    """
    shares = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    share = float(shares.median() if routed else (found - wanted).norm() / wanted.norm())
    of = "the median token's logits" if routed else "the logits"
    largest = float((found - wanted).abs().max() / wanted.abs().max())
    limit = f"(limit {ROUNDED_TOLERANCE:.0e})"
    detail = f"{of} moved by {share:.2g} of their norm {limit}, by up to {largest:.2g} of the largest"
    result = _judged(what, share <= ROUNDED_TOLERANCE, detail, found, wanted, share=share)
    if routed:
        result.numbers["max_abs_difference"] = float((found - wanted).abs().amax(dim=1).median())
    return result


def _judged(what: str, passes: bool, detail: str, found: Tensor, wanted: Tensor, **numbers: float) -> PromiseResult:
    numbers |= {
        "max_abs_difference": float((found - wanted).abs().max()),
        "max_abs_logit": float(wanted.abs().max()),
        "tokens": float(len(wanted)),
    }
    title = "the merged model equals base + adapter"
    return PromiseResult("E6", title, "pass" if passes else "fail", f"{what}: {detail}", numbers)


def _beside_quantised(facts: AdapterFacts, base: Path, merged: Path, ids: list[int]) -> PromiseResult:
    """How far the merge into the full base is from the model that was trained, beside what quantising had changed."""
    rows = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    known = [token for token in ids if token < rows]  # the bare base knows no new tokens
    with base_files(facts, quantised=True) as quantised:
        moved = _rms(plain_logits(merged, known) - adapted_logits(facts, quantised, known))
        quantising = _rms(plain_logits(base, known) - plain_logits(quantised, known))
    return PromiseResult(
        "E6",
        "the merge into the full-precision base stays near the model that was trained over the quantised one",
        "pass" if moved <= QUANTISED_RATIO * quantising else "fail",
        f"logits differ by {moved:.3g} (root mean square); quantising the base had moved them by {quantising:.3g}",
        {"merged_to_trained": moved, "base_to_quantised": quantising},
    )


def _rms(difference: Tensor) -> float:
    return float(difference.pow(2).mean().sqrt())


def adapted_logits(facts: AdapterFacts, base: Path, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of the adapter on the files in `base`, by peft's own forward, in fp32."""
    model, shards = empty_adapted(facts, base), Shards(base)
    plain = unwrapped_names(base_model_of(model), [name for name, _ in _parameters(base_model_of(model))])
    found = _findable(empty_base(base, facts.rows), shards)
    if found is None:
        return probe_logits(_whole(facts, base), ids)
    prefix = "base_model.model."
    own = {name: parameter.detach() for name, parameter in _parameters(model) if not is_empty(parameter)}
    shapes = {name: parameter.shape for name, parameter in _parameters(model)}

    def read(name: str) -> Tensor:
        if name in own:
            return own[name]
        return with_rows(shards.read(found[plain[name.removeprefix(prefix)]]).float(), shapes[name])

    return _streamed(model, _Weights(list(shapes), read), ids)


def _whole(facts: AdapterFacts, base: Path) -> PeftModel:
    """Base + adapter in fp32, in memory as a whole: for files that are laid out unlike the model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if facts.rows is not None and facts.rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(facts.rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, facts.folder)


def plain_logits(folder: Path, ids: list[int], rows: int | None = None) -> Tensor:
    """Logits of the plain model in `folder`, in fp32."""
    model, shards = empty_base(folder, rows), Shards(folder)
    found = _findable(model, shards)
    if found is None:
        return probe_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    shapes = {name: parameter.shape for name, parameter in _parameters(model)}
    weights = _Weights(list(shapes), lambda name: with_rows(shards.read(found[name]).float(), shapes[name]))
    return _streamed(model, weights, ids)


def _summed_logits(facts: AdapterFacts, base: Path, merged: Path, ids: list[int]) -> Tensor:
    """Logits of base + change in fp32, before anything is rounded.

    NaN unless the files in `merged` hold every changed tensor, rounded to a neighbour. Where they are laid out unlike
    the model, the sum is peft's own.
    """
    model, shards, saved = empty_base(base, facts.rows), Shards(base), Shards(merged)
    found = _findable(model, shards)
    plan = plan_merge(empty_adapted(facts, base), model, shards)
    assert plan is not None, "base_files has looked"
    if found is None:
        summed = _whole(facts, base).merge_and_unload(safe_merge=True)
        logits = probe_logits(summed, ids)
        return logits if _holds(merged, summed) else torch.full_like(logits, torch.nan)
    shapes = {name: parameter.shape for name, parameter in _parameters(model)}

    def read(name: str) -> Tensor:
        stored = shards.read(found[name])
        if found[name] not in plan.targets:
            return stored.float()
        value = plan.merged(found[name], stored)
        return value if is_rounded(saved.read(found[name]), value) else torch.full_like(value, torch.nan)

    return _streamed(empty_base(base, facts.rows), _Weights(list(shapes), read), ids)


def _holds(merged: Path, summed: PreTrainedModel) -> bool:
    """Whether the model in `merged` has the parameters of `summed`, each rounded to a neighbour."""
    saved = dict(AutoModelForCausalLM.from_pretrained(merged).named_parameters())
    return all(is_rounded(saved[name], value) for name, value in summed.named_parameters())


def _findable(model: PreTrainedModel, shards: Shards) -> dict[str, str] | None:
    """Parameter → its tensor in the files; None where the two are laid out differently (fused experts)."""
    found = {}
    for name, names in aliases_of(model).items():
        there = [name, *sorted(names)]
        held = next((other for other in there if other in shards.file_of), None)
        if held is None:
            return None
        found[name] = held
    return found


def _parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def _streamed(model: PreTrainedModel | PeftModel, weights: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    """Logits of an empty model whose parameters are loaded layer by layer and let go of again."""
    layers = [*(base_model_of(model)._no_split_modules or ()), "TrainableTokensWrapper", "ModulesToSaveWrapper"]
    # The hooks stay: taking them off would load every weight for good, and nobody uses the model again.
    cpu_offload(model, torch.device("cpu"), state_dict=weights, preload_module_classes=layers)
    with torch.autocast("cpu", enabled=False):
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits
