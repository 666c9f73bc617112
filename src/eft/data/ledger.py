"""The token ledger: where every raw token of every data set went (promise E5).

    raw tokens  = trainable + context + truncated + held out + dropped (by reason)
    rows        = samples + held out + dropped (by reason) − further samples (beyond the first of their row)

and where the mixture repeats samples, less what it repeats: `samples`, `trainable` and `context` count each time.

`raw` is counted when rows are tokenised; `trainable` and `context` are counted on the samples that are trained or
evaluated in the end. `check` compares the two, so that a sample lost in between cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eft.core.errors import PromiseBroken

Reason = Literal[
    "malformed",
    "template",
    "too_short",
    "too_long",
    "no_trainable_tokens",
    "duplicate",
    "held_out_duplicate",
    "over_cap",
    "not_drawn",
    "not_reached",
]
"""Why a row is dropped. Rows that are malformed or defeat the chat template have no tokens: only rows are counted.

`not_reached`: read from a stream, and still in its buffer when the run ended."""

ROWS_KEPT = 20
"""Rows named per reason."""

_SUMMED = ("rows", "raw", "samples", "further_samples", "trainable", "context", "truncated_rows", "truncated")
_NUMBERS = ("rows", "raw", "samples", "further_samples", "trainable", "context", "truncated_rows", "truncated")
"""The fields of an account that add up."""

HEADER = ["data set", "rows", "samples", "raw tokens", "trainable", "context", "truncated", "held out", "dropped"]
"""Column titles of `Ledger.table`."""


@dataclass
class Portion:
    """Rows that went somewhere else than into the samples, with their tokens (after truncation)."""

    rows: int = 0
    tokens: int = 0
    first_rows: list[str] = field(default_factory=list)
    """The first ROWS_KEPT of them, such as `data.jsonl row 17`; for malformed rows the whole message."""

    def add(self, row: str, tokens: int) -> None:
        """Count one row."""
        self.rows += 1
        self.tokens += tokens
        if len(self.first_rows) < ROWS_KEPT:
            self.first_rows.append(row)


@dataclass
class SourceLedger:
    """One data set's account."""

    name: str
    split: Literal["train", "eval"] = "train"
    rows: int = 0
    """Rows read."""
    raw: int = 0
    """Tokens of all rows that could be tokenised, before anything was cut."""
    samples: int = 0
    further_samples: int = 0
    """Samples beyond the first of their row: a long text that was cut, a conversation trained turn by turn."""
    trainable: int = 0
    context: int = 0
    truncated_rows: int = 0
    truncated: int = 0
    """Tokens cut off the ends of over-long samples."""
    repeated: Portion = field(default_factory=Portion)
    """Samples of an epoch beyond the first time of each; counted in `samples`, `trainable` and `context`."""
    held_out: Portion = field(default_factory=Portion)
    """Moved to evaluation by `val_set_size`."""
    dropped: dict[str, Portion] = field(default_factory=dict)
    rounds: int = 0
    """How often a stream has come to its end and begun anew; rows are counted in every round."""

    def drop(self, reason: Reason, row: str, tokens: int) -> None:
        """Count a dropped row of `tokens` tokens."""
        self.dropped.setdefault(reason, Portion()).add(row, tokens)

    def add(self, other: SourceLedger) -> None:
        """Count the rows of a later part of the same data set, before anything is held out."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, portion in other.dropped.items():
            own = self.dropped.setdefault(reason, Portion())
            own.rows += portion.rows
            own.tokens += portion.tokens
            own.first_rows += portion.first_rows[: ROWS_KEPT - len(own.first_rows)]

    def rename_files(self, names: dict[str, str]) -> None:
        """Say where the rows are now: `names` has the file of today for each one of then."""
        for portion in (self.held_out, *self.dropped.values()):
            portion.first_rows = [_renamed(row, names) for row in portion.first_rows]

    @property
    def epochs(self) -> float:
        """How often the samples that may be trained come in an epoch, on average."""
        not_drawn = self.dropped["not_drawn"].rows if "not_drawn" in self.dropped else 0
        available = self.samples - self.repeated.rows + not_drawn
        return self.samples / available if available else 0.0

    @property
    def dropped_rows(self) -> int:
        return sum(portion.rows for portion in self.dropped.values())

    @property
    def dropped_tokens(self) -> int:
        return sum(portion.tokens for portion in self.dropped.values())

    def check(self) -> None:
        """Raise PromiseBroken, with the numbers, unless rows and tokens balance to the last one."""
        where = f"{self.name} ({self.split})"
        less = f" − repeated {self.repeated.rows} rows {self.repeated.tokens} tokens" if self.repeated.rows else ""
        dropped = ", ".join(f"{name} {p.rows} rows {p.tokens} tokens" for name, p in self.dropped.items()) or "nothing"
        accounted = self.trainable + self.context + self.truncated + self.held_out.tokens + self.dropped_tokens
        accounted -= self.repeated.tokens
        if accounted != self.raw:
            raise PromiseBroken(
                f"E5: the tokens of {where} do not balance: {self.raw} raw, but trainable {self.trainable} + context "
                f"{self.context} + truncated {self.truncated} + held out {self.held_out.tokens} + dropped "
                f"{self.dropped_tokens}{less} = {accounted} (dropped: {dropped})"
            )
        rows = self.samples + self.held_out.rows + self.dropped_rows - self.further_samples - self.repeated.rows
        if rows != self.rows:
            raise PromiseBroken(
                f"E5: the rows of {where} do not balance: {self.rows} read, but samples {self.samples} + held out "
                f"{self.held_out.rows} + dropped {self.dropped_rows} − further samples {self.further_samples}{less} = "
                f"{rows} (dropped: {dropped})"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SourceLedger:
        parts = dict(value)
        parts["held_out"] = Portion(**value["held_out"])
        parts["repeated"] = Portion(**value.get("repeated", {}))
        parts["dropped"] = {reason: Portion(**portion) for reason, portion in value["dropped"].items()}
        return cls(**parts)


def _renamed(text: str, names: dict[str, str]) -> str:
    for old in sorted(names, key=len, reverse=True):
        if text.startswith(old):
            return names[old] + text[len(old) :]
    return text


@dataclass
class Ledger:
    """The accounts of all data sets of a run, training data first."""

    sources: list[SourceLedger] = field(default_factory=list)
    gates: dict[str, Any] | None = None
    """What the gates found, JSON-able (`gates.GateReport`)."""

    def check(self) -> None:
        """Raise PromiseBroken naming the first data set that does not balance."""
        for source in self.sources:
            source.check()

    def of(self, split: Literal["train", "eval"]) -> list[SourceLedger]:
        """The accounts of one split."""
        return [source for source in self.sources if source.split == split]

    def table(self) -> list[list[str]]:
        """Rows of text under HEADER: one per data set, then a total per split that has several."""
        rows = [_cells(source) for source in self.sources]
        for split in ("train", "eval"):
            sources = self.of(split)
            if len(sources) > 1:
                rows.append(_cells(_total(sources)))
        return rows

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping; `from_json` is its inverse."""
        sources = [source.to_json() for source in self.sources]
        return {"sources": sources} if self.gates is None else {"sources": sources, **self.gates}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Ledger:
        gates = {name: part for name, part in value.items() if name != "sources"}
        return cls([SourceLedger.from_json(source) for source in value["sources"]], gates or None)


def _total(sources: Iterable[SourceLedger]) -> SourceLedger:
    sources = list(sources)
    total = SourceLedger(name=f"all ({sources[0].split})", split=sources[0].split)
    for source in sources:
        for name in (
            "rows",
            "raw",
            "samples",
            "further_samples",
            "trainable",
            "context",
            "truncated_rows",
            "truncated",
        ):
            setattr(total, name, getattr(total, name) + getattr(source, name))
        for portion, into in [(source.held_out, total.held_out), (source.repeated, total.repeated)] + [
            (portion, total.dropped.setdefault(reason, Portion())) for reason, portion in source.dropped.items()
        ]:
            into.rows += portion.rows
            into.tokens += portion.tokens
    return total


def _cells(source: SourceLedger) -> list[str]:
    dropped = "\n".join(
        f"{reason.replace('_', ' ')}: {portion.rows:,} rows"
        + (f", {portion.tokens:,} tokens" if portion.tokens else "")
        for reason, portion in source.dropped.items()
    )
    held_out = f"{source.held_out.tokens:,} ({source.held_out.rows:,} rows)" if source.held_out.rows else "0"
    truncated = f"{source.truncated:,} ({source.truncated_rows:,} rows)" if source.truncated_rows else "0"
    share = f" ({source.trainable / (source.trainable + source.context):.0%})" if source.samples else ""
    return [
        source.name if source.split == "train" else f"{source.name} (evaluation)",
        f"{source.rows:,}",
        f"{source.samples:,}" + (f" (× {source.epochs:.3g})" if source.epochs not in (0.0, 1.0) else ""),
        f"{source.raw:,}",
        f"{source.trainable:,}{share}",
        f"{source.context:,}",
        truncated,
        held_out,
        dropped or "0",
    ]
