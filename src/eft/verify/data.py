"""E5: every token of every data set is accounted for, every sample is trained exactly once per epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import PromiseBroken
from eft.core.records import Int64Array, PromiseResult, TokenDataset
from eft.data.balance import bin_costs, share_step
from eft.data.dataset_meta import DatasetMeta
from eft.data.gates import GateResult
from eft.data.plan import Plan, StepPlan
from eft.data.sample_set import DIGEST_DTYPE, SampleSet, digests_of, measure
from eft.verify.verification import Verification

WORLD_SIZES = (1, 2, 3)
MOST_SHARED_STEPS = 500
"""Steps of which the shares of every rank are looked at; a longer plan is sampled evenly."""
MOST_ROWS = 256
"""Rows of each data set that are read again."""


def check_data(verification: Verification) -> list[PromiseResult]:
    """The ledger, the plan and the stored samples."""
    return [
        check_ledger(verification.meta),
        check_plan(verification.plan, verification.config.micro_batch_size),
        check_store(verification.meta, _vocabulary(verification)),
        *check_gates(verification.meta),
    ]


def _vocabulary(verification: Verification) -> int:
    return int(verification.model.get_input_embeddings().weight.shape[0])


def check_ledger(meta: DatasetMeta) -> PromiseResult:
    """Every raw token is in one column of the ledger, and the columns are what the data sets hold."""
    title = "every raw token accounted for"
    if meta.ledger is None:
        return PromiseResult("E5", title, "not applicable", "the data sets were prepared elsewhere")
    try:
        meta.ledger.check()
    except PromiseBroken as error:
        return PromiseResult("E5", title, "fail", str(error))
    sources = meta.ledger.of("train")
    data = meta.train_dataset
    tokens, trainable = int(data.lengths.sum(dtype=np.int64)), int(data.trainable_counts.sum(dtype=np.int64))
    counted = sum(source.trainable + source.context for source in sources)
    pairs = (
        ("samples", len(data), sum(source.samples for source in sources)),
        ("trainable tokens", trainable, sum(source.trainable for source in sources)),
        ("tokens", tokens, counted),
    )
    faults = [f"the data set has {there:,} {what}, the ledger {told:,}" for what, there, told in pairs if there != told]
    raw = sum(source.raw for source in meta.ledger.sources)
    rows = sum(source.rows for source in meta.ledger.sources)
    balance = f"{rows:,} rows, {raw:,} raw tokens; {trainable:,} trainable + {tokens - trainable:,} context"
    numbers = {"rows": float(rows), "raw_tokens": float(raw), "trainable_tokens": float(trainable)}
    return PromiseResult("E5", title, "fail" if faults else "pass", "; ".join([*faults, balance]), numbers)


def check_gates(meta: DatasetMeta) -> list[PromiseResult]:
    """The prepared data keep every gate's limit, and all conversations are what `apply_chat_template` gives."""
    limits, template = "prepared data keep every gate's limit", "ids and prompts are those of apply_chat_template"
    if meta.gates is None:
        why = "data_gates: off, or data that were not prepared here"
        return [PromiseResult("data gates", limits, "not applicable", why)]
    judged = [result for result in meta.gates.results if result.status != "not applicable"]
    others = [result for result in judged if result.gate != "template"]
    compared = [result for result in judged if result.gate == "template"]
    held = f"{len(others)} checks of {len({result.source for result in others})} data sets"
    found = [_gates_promise(limits, others, held)]
    if compared:
        held = f"{meta.gates.compared:,} conversations compared, with the prompt of every trained turn"
        found.append(_gates_promise(template, compared, held))
    return found


def _gates_promise(title: str, results: list[GateResult], held: str) -> PromiseResult:
    over = [result for result in results if result.status == "over"]
    judged, faulty = sum(result.judged for result in results), sum(result.faulty for result in results)
    detail = "; ".join(map(_gate_text, over[:3])) or held
    numbers = {"judged": float(judged), "faulty": float(faulty)}
    return PromiseResult("data gates", title, "fail" if over else "pass", detail, numbers)


def _gate_text(result: GateResult) -> str:
    worst = "".join(f", {row.origin}{': ' + row.note if row.note else ''}" for row in result.worst[:1])
    return f"{result.gate}: {result.source}: {result.line()}{worst}"


def check_plan(plan: Plan, micro_batch_size: int) -> PromiseResult:
    """Every sample exactly once in each whole epoch, at most once in a part of one; the same on 1, 2 and 3 ranks."""
    faults: list[str] = []
    shared = set(np.linspace(0, plan.total_steps - 1, MOST_SHARED_STEPS, dtype=np.int64).tolist())
    steps_of_epochs = [epoch["steps"] for epoch in plan.summary()["epochs"]]
    for epoch, last in enumerate(plan.epoch_ends):
        first = last - plan.steps_per_epoch[epoch]
        seen = np.zeros(len(plan.dataset), dtype=np.int64)
        for number in range(first, last):
            step = plan.step(number)
            seen += np.bincount(np.concatenate(step.bins), minlength=len(seen))
            faults += _step_faults(plan, step)
            if number in shared:
                faults += _share_faults(plan, step, micro_batch_size)
        whole = last - first == steps_of_epochs[epoch]
        if int(seen.max()) > 1 or (whole and int(seen.min()) < 1):
            missing, repeated = int((seen == 0).sum()), int((seen > 1).sum())
            faults.append(f"epoch {epoch}: {missing if whole else 0} samples missing, {repeated} repeated")
    detail = (
        f"{plan.total_steps:,} steps, {len(plan.dataset):,} samples: each once per epoch, "
        f"on {', '.join(map(str, WORLD_SIZES))} ranks"
    )
    numbers = {"steps": float(plan.total_steps), "samples": float(len(plan.dataset)), "faults": float(len(faults))}
    title = "every sample once per epoch, on any world size"
    return PromiseResult("E5", title, "fail" if faults else "pass", "; ".join(faults[:3]) or detail, numbers)


def _step_faults(plan: Plan, step: StepPlan) -> Iterator[str]:
    """What is wrong with a step's own numbers."""
    ids = np.concatenate(step.bins)
    if int(plan.dataset.lengths[ids].sum(dtype=np.int64)) != step.tokens:
        yield f"step {step.step}: says {step.tokens} tokens"
    if not np.isclose(float(plan.dataset.weight_sums[ids].sum()), step.weight, rtol=1e-12, atol=0.0):
        yield f"step {step.step}: says Σ weight {step.weight}"
    fullest = max(int(plan.dataset.lengths[bin_ids].sum(dtype=np.int64)) for bin_ids in step.bins)
    if fullest > plan.capacity:
        yield f"step {step.step}: a bin of {fullest} tokens, capacity {plan.capacity}"


def _share_faults(plan: Plan, step: StepPlan, micro_batch_size: int) -> Iterator[str]:
    """World sizes on which the ranks' shares together are not the step."""
    costs = bin_costs(plan.dataset.lengths, step.bins, 0.0)
    wanted = np.sort(np.concatenate(step.bins))
    for world_size in WORLD_SIZES:
        accumulation = -(-plan.global_batch_size // (world_size * micro_batch_size))
        ranks = share_step(step, costs, world_size, accumulation, micro_batch_size)
        ids = [bin_ids for rank in ranks for micro_batch in rank for bin_ids in micro_batch]
        if not np.array_equal(np.sort(np.concatenate(ids)), wanted):
            yield f"step {step.step} on {world_size} ranks: the shares are not the step's samples"


def check_store(meta: DatasetMeta, vocabulary: int) -> PromiseResult:
    """Rows read again from the store: lengths, trainable tokens and weights are those that the plan goes by."""
    faults: list[str] = []
    rows = 0
    for name, dataset in _datasets(meta).items():
        for index in _some_indices(len(dataset)):
            rows += 1
            faults += [f"{name} sample {index}: {fault}" for fault in _row_faults(dataset, int(index), vocabulary)]
    detail = "; ".join(faults[:3]) or f"{rows:,} rows read again: lengths, trainable tokens and weights agree"
    numbers = {"rows": float(rows), "faults": float(len(faults))}
    return PromiseResult("E5", "stored samples are what the plan counts", "fail" if faults else "pass", detail, numbers)


def _datasets(meta: DatasetMeta) -> dict[str, TokenDataset]:
    evals = meta.eval_dataset
    if evals is None:
        return {"training": meta.train_dataset}
    return {"training": meta.train_dataset, **(evals if isinstance(evals, dict) else {"held-out": evals})}


def _some_indices(count: int) -> Int64Array:
    return np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS), dtype=np.int64))


def _row_faults(dataset: TokenDataset, index: int, vocabulary: int) -> Iterator[str]:
    sample = dataset.sample(index)
    count, weight = measure(sample)
    pairs = (
        ("tokens", len(sample.input_ids), int(dataset.lengths[index])),
        ("trainable tokens", count, int(dataset.trainable_counts[index])),
        ("Σ weight", weight, float(dataset.weight_sums[index])),
    )
    yield from (f"{there} {what}, the plan counts {told}" for what, there, told in pairs if there != told)
    if not (int(sample.input_ids.min()) >= 0 and int(sample.input_ids.max()) < vocabulary):
        yield f"an id outside the model's {vocabulary} embeddings"
    if not np.all((sample.labels == sample.input_ids) | (sample.labels == IGNORE_INDEX)):
        yield "a label that is neither its token nor masked"
    # Through numpy, as it cuts zeros off the end of a digest that it hands out.
    digest = np.array(digests_of(sample)[1], DIGEST_DTYPE)
    if isinstance(dataset, SampleSet) and digest != dataset.sample_digests[index]:
        yield "its content is not what was stored (digest differs)"
