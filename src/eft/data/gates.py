"""The gates: what must hold of all prepared rows before anything is trained, with limits, and the worst rows.

`survey_entry` looks at every sample of one store (once: the result is kept beside it), `check_gates` judges all data
sets of a run together. See docs/data-gates.md for what each gate counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from eft.config.data import DataConfig, GateName
from eft.core.errors import DataGateError
from eft.core.records import ShownRow
from eft.data.gates_entry import GatedEntry, compared, surveyed
from eft.data.gates_survey import PER_STORE, Count, Survey
from eft.data.prepare import PreparedData
from eft.data.sample_set import Digests, SampleSet, TokenView
from eft.data.shown import MOST_TOKENS, shown_row

GATES: dict[GateName, tuple[float, str]] = {
    "untrained_rows": (0.2, "rows without anything to train"),
    "bos": (0.0, "samples without exactly one BOS"),
    "end_tokens": (0.01, "trained turns whose end token is not trained"),
    "cut_answers": (0.2, "samples cut off inside an answer"),
    "fully_trained": (0.01, "samples trained from their first token"),
    "other_roles": (0.0, "samples that train a turn of another role"),
    "headers": (0.0, "samples that train a turn's opening"),
    "empty_reasoning": (0.0, "samples that train an empty block of reasoning"),
    "duplicates": (0.2, "samples equal to an earlier one"),
    "leaks": (0.01, "held-out samples that training has, too, but for case, blanks and punctuation"),
    "template": (0.01, "conversations that apply_chat_template gives otherwise"),
}
"""Gate → (default limit, a share of what it judges; what it counts)."""

logger = logging.getLogger(__name__)

_REMEDIES: dict[GateName, str] = {
    "untrained_rows": "look at `roles_to_train`, `sequence_len` and the rows' own marks",
    "bos": "the template and the rows' own ids decide where BOS stands: remove it there, or add it",
    "end_tokens": "a model that is not trained on its end token never stops: put the token into the template (inside "
    "`{% generation %}`, where it has that; or `generation_tags: ignore`), and mask padding by position, not by id",
    "cut_answers": "raise `sequence_len`, or use `excess_length_strategy: drop`",
    "fully_trained": "mask the prompts, or say `train_on_inputs: true`",
    "other_roles": "mask these turns, or name the role in `roles_to_train`",
    "headers": "the model is given these tokens and never writes them: mask them",
    "empty_reasoning": "training on it teaches not to think: mask it",
    "duplicates": "set `dataset_exact_deduplication: true`; to repeat a data set on purpose use `weight`",
    "leaks": "remove these rows from one of the sides",
    "template": "the server would give the model other tokens: use the template that is saved with the model",
}
_MOST_ROWS = 3
_NO_LIMIT_OF_FEW = 2


@dataclass(frozen=True)
class Worst:
    """A sample that a gate found at fault."""

    origin: str
    base: str
    """The data set."""
    index: int
    """Number in the data set's store."""
    note: str = ""


@dataclass
class GateResult:
    """One gate on one data set."""

    gate: GateName
    source: str
    faulty: int
    judged: int
    limit: float
    note: str = ""
    worst: list[Worst] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Faulty ones among those judged."""
        return self.faulty / self.judged if self.judged else 0.0

    @property
    def status(self) -> Literal["pass", "over", "not applicable"]:
        """Whether the limit is kept."""
        if not self.judged:
            return "not applicable"
        return "over" if self.share > self.limit else "pass"

    def line(self) -> str:
        """`12 of 100 rows without anything to train (12.00 %, limit 20.00 %)`."""
        text = (
            f"{self.faulty:,} of {self.judged:,} {GATES[self.gate][1]} ({_percent(self.share)}, "
            f"limit {_percent(self.limit)})"
        )
        return f"{text}; {self.note}" if self.note else text


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


@dataclass
class GateReport:
    """All gates on all data sets."""

    results: list[GateResult]
    roles: dict[str, dict[str, tuple[int, int]]]
    """Data set → role → (tokens, trained tokens)."""
    unlocated: dict[str, tuple[int, int]]
    """Data set → (conversations whose turns could not be found in their ids, conversations)."""
    compared: int
    """Conversations that were compared with apply_chat_template."""
    conversations: int
    seconds: float
    action: str

    @property
    def over(self) -> list[GateResult]:
        """The results over their limit."""
        return [result for result in self.results if result.status == "over"]

    def line(self) -> str:
        """One line for the start table."""
        judged = [result for result in self.results if result.status != "not applicable"]
        over = ", ".join(dict.fromkeys(result.gate for result in self.over))
        state = f"over the limit: {over}" if over else f"{len(judged)} checks hold"
        with_template = (
            f" · {self.compared:,} of {self.conversations:,} conversations compared with apply_chat_template"
        )
        return f"{state}{with_template if self.conversations else ''} · {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        """For ledger.json."""
        gates = [
            {**asdict(result), "share": result.share, "status": result.status, "what": GATES[result.gate][1]}
            for result in self.results
        ]
        return {"gates": gates, "roles": self.roles, "unlocated": self.unlocated, "compared": self.compared}


def check_gates(
    cfg: DataConfig,
    entries: Sequence[GatedEntry],
    train: TokenView | None,
    evals: Mapping[str, SampleSet],
    *,
    compare_all: bool = False,
) -> GateReport | None:
    """Judge the prepared data of a run; None with `data_gates: off`.

    Args:
        entries: training data sets in the order of `train.bases`, then evaluation ones.
        train: what is trained, after mixing; None: nothing was prepared of it.
        evals: the held-out sets.
        compare_all: compare every conversation with apply_chat_template, not `data_gate_conversations` of each set.
    """
    if cfg.data_gates == "off":
        return None
    started = time.perf_counter()
    surveys = [surveyed(entry) for entry in entries]
    results: list[GateResult] = []
    num_compared = 0
    chats = [entry for entry in entries if entry.template is not None]
    is_served_otherwise = bool(chats) and not any(entry.is_as_served for entry in chats)
    for entry, survey in zip(entries, surveys, strict=True):
        results.append(_untrained(entry))
        results += [_of_count(name, entry, survey.counts[name]) for name in PER_STORE]
        faults, judged = compared(entry, None if compare_all else cfg.data_gate_conversations)
        num_compared += judged
        results.append(_template_result(entry, faults, judged, serves_another=is_served_otherwise))
    if train is not None:
        results += _duplicates(entries, train)
        results += _leaks(entries, surveys, train, evals)
    limits = {**{name: limit for name, (limit, _) in GATES.items()}, **cfg.data_gate_limits}
    for result in results:
        result.limit = limits[result.gate]
    names = [entry.name for entry in entries]
    return GateReport(
        results,
        {name: survey.roles for name, survey in zip(names, surveys, strict=True) if survey.roles},
        {n: (s.unlocated, s.conversations) for n, s in zip(names, surveys, strict=True) if s.unlocated},
        num_compared,
        sum(survey.conversations for survey in surveys),
        time.perf_counter() - started,
        cfg.data_gates,
    )


def pass_gates(
    cfg: DataConfig, prepared: PreparedData, tokenizer: Any, *, stop: bool = True, compare_all: bool = False
) -> GateReport | None:
    """Judge prepared data, put the result into their ledger, and stop or warn as `data_gates` says.

    None with `data_gates: off`, and for data that were not prepared here.

    Raises DataGateError, with the worst rows, where `stop` and `data_gates: error` say so.
    """
    data = prepared.gated
    if data is None:
        return None
    report = check_gates(cfg, data.entries, data.train, data.evals, compare_all=compare_all)
    if report is None:
        return None
    prepared.ledger.gates = report.to_json()
    error = gate_error(report, data.entries, tokenizer)
    if error is not None and cfg.data_gates == "error" and stop:
        raise error
    if error is not None and stop:
        logger.warning("%s", error)
    return report


def gate_error(report: GateReport, entries: Sequence[GatedEntry], tokenizer: Any) -> DataGateError | None:
    """What to raise, with the worst rows decoded; None where every limit is kept."""
    if not report.over:
        return None
    lines, rows = [], []
    by_name = {entry.name: entry for entry in entries}
    for result in report.over:
        shown = result.worst[:_MOST_ROWS]
        first = ", ".join(worst.origin for worst in shown)
        lines.append(f"  {result.gate}: {result.source}: {result.line()}" + (f". First: {first}" if first else ""))
        if result.worst and result.worst[0].note:
            lines.append(f"    {result.worst[0].note}")
        lines.append(f"    {_REMEDIES[result.gate]}")
        rows += [_shown(result.gate, worst, by_name[worst.base], tokenizer) for worst in shown]
    head = "the prepared data are over the limit of " + (
        "a gate" if len(report.over) == 1 else f"{len(report.over)} gates"
    )
    tail = (
        "Mend the data; or, where this is meant, raise the limit with `data_gate_limits: {"
        + f"{report.over[0].gate}: …}}`, or set `data_gates: warn`"
    )
    return DataGateError("\n".join([f"{head}:", *lines, tail]), rows)


def _shown(gate: GateName, worst: Worst, entry: GatedEntry, tokenizer: Any) -> ShownRow:
    sample = entry.store.sample(worst.index)
    note = f"{gate}: {worst.note or GATES[gate][1]}"
    return shown_row(worst.origin, sample, tokenizer, note=note, most_tokens=MOST_TOKENS)


def _worst(entry: GatedEntry, indices: Sequence[int], notes: Sequence[str] = ()) -> list[Worst]:
    padded = [*notes, *[""] * (len(indices) - len(notes))]
    return [
        Worst(entry.store.origin(int(index)), entry.name, int(index), note)
        for index, note in zip(indices, padded, strict=True)
    ]


def _untrained(entry: GatedEntry) -> GateResult:
    account = entry.account
    portion = account.dropped.get("no_trainable_tokens")
    faulty = portion.rows if portion is not None else 0
    note = f"first: {', '.join(portion.first_rows[:_MOST_ROWS])}" if portion is not None else ""
    return GateResult("untrained_rows", entry.name, faulty, account.rows, 0.0, note)


def _of_count(name: GateName, entry: GatedEntry, count: Count) -> GateResult:
    worst = _worst(entry, [index for index, _ in count.worst])
    return GateResult(name, entry.name, count.faulty, count.judged, 0.0, worst=worst)


def _template_result(
    entry: GatedEntry, faults: Sequence[tuple[int, str]], judged: int, *, serves_another: bool
) -> GateResult:
    worst = _worst(entry, [index for index, _ in faults[:_MOST_ROWS]], [fault for _, fault in faults[:_MOST_ROWS]])
    faulty = len(faults)
    note = ""
    if serves_another and entry.template is not None:
        faulty, note = judged, "made with another template than the one that is saved with the model"
    return GateResult("template", entry.name, faulty, judged, 0.0, note, worst)


def _halves(digests: Digests) -> np.ndarray[Any, Any]:
    """64 of a digest's 128 bits, uint64 [samples]: enough to count by, and much faster to sort."""
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)[:, 0]


def _duplicates(entries: Sequence[GatedEntry], train: TokenView) -> list[GateResult]:
    """Samples of a data set that equal an earlier one of it; those that the mixture repeats count once."""
    results = []
    owners = train.base_ids()
    starts = np.cumsum([0, *(len(base) for base in train.bases)])
    for number, entry in enumerate(entries[: len(train.bases)]):
        mine = np.unique(train.positions[owners == number] - starts[number])
        _, first = np.unique(_halves(entry.store.sample_digests[mine]), return_index=True)
        is_copy = np.ones(len(mine), dtype=np.bool_)
        is_copy[first] = False
        worst = _worst(entry, mine[is_copy][:_MOST_ROWS].tolist())
        results.append(GateResult("duplicates", entry.name, int(is_copy.sum()), len(mine), 0.0, worst=worst))
    return results


def _leaks(
    entries: Sequence[GatedEntry], surveys: Sequence[Survey], train: TokenView, evals: Mapping[str, SampleSet]
) -> list[GateResult]:
    """Held-out samples whose text training has, too. Exact copies have left the training part before (`mixture`)."""
    keys = {id(entry.store): survey.text_keys for entry, survey in zip(entries, surveys, strict=True)}
    trained = _keys_of(train, keys)
    results = []
    for name, held_out in evals.items():
        own = _keys_of(held_out, keys)
        common = np.flatnonzero(np.isin(trained, own))
        leaked = int(np.isin(own, trained[common]).sum())
        worst = []
        for index in common[:_MOST_ROWS].tolist():
            number = int(train.base_ids()[index])
            position = int(train.positions[index]) - sum(len(base) for base in train.bases[:number])
            worst += _worst(entries[number], [position], [f"a row of {name} has the same text"])
        removed = sum(
            portion.rows
            for entry in entries
            if (portion := entry.account.dropped.get("held_out_duplicate")) is not None
        )
        note = f"{removed:,} exact copies were left out of training" if removed else ""
        results.append(GateResult("leaks", name, leaked, len(own), 0.0, note, worst))
    return results


def _keys_of(samples: SampleSet, keys: Mapping[int, Any]) -> np.ndarray[Any, Any]:
    if not isinstance(samples, TokenView):
        return np.asarray(keys[id(samples)])
    return np.concatenate([keys[id(base)] for base in samples.bases])[samples.positions]
