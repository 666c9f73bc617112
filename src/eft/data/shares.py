"""How much of each data set an epoch has: caps, repeats, random parts, exact shares of the tokens. Pure functions.

Which rows come goes by the content of each, ranked by a hash with the seed (`mixture.row_ranks`), so that neither the
world size nor rows that are added elsewhere change much of it. All samples of a row have one rank: they are taken in
order, and only the row that a target ends in may be taken in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eft.config.data import DatasetConfig
from eft.core.records import Int32Array, Int64Array


@dataclass(frozen=True)
class SourceShare:
    """What an entry of `datasets` asks for."""

    weight: float = 1.0
    """How often each sample comes."""
    token_share: float | None = None
    """Share of the epoch's tokens."""
    max_rows: int | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, spec: DatasetConfig) -> SourceShare:
        """The keys of an entry."""
        return cls(spec.weight, spec.token_share, spec.max_rows, spec.max_tokens)


@dataclass(frozen=True)
class Drawn:
    """What becomes of the samples of one data set that are there to be trained."""

    taken: Int64Array
    """Once for each time that a sample comes in an epoch; repeats of one pass stand together."""
    over_cap: Int64Array
    not_drawn: Int64Array
    """Left out by a `weight` below 1 or a `token_share`."""


def draw(
    sources: Sequence[Int64Array],
    ranks: Sequence[Int64Array],
    rows: Sequence[Int64Array],
    lengths: Sequence[Int32Array],
    shares: Sequence[SourceShare],
    epoch_tokens: int | None,
) -> list[Drawn]:
    """Apply caps, then weights and shares.

    Args:
        sources: per data set the samples that may be trained, ascending, any numbers.
        ranks: per data set a random number for each of them, the same for the samples of one row.
        rows: per data set a number for each of them, equal for the samples of one row.
        lengths: per data set the tokens of each of them.
        shares: what each asks for.
        epoch_tokens: tokens of an epoch where some data set has a `token_share`; None: as many as there are.

    Returns:
        per data set what is taken; its tokens are within one sample of what was asked.
    """
    orders = [np.argsort(rank, kind="stable") for rank in ranks]
    kept = [
        order[: _capped(rows[number][order], lengths[number][order], share)]
        for number, (order, share) in enumerate(zip(orders, shares, strict=True))
    ]
    tokens = [int(lengths[number][order].sum(dtype=np.int64)) for number, order in enumerate(kept)]
    targets = _targets(tokens, shares, epoch_tokens)
    drawn = []
    for number, (share, target) in enumerate(zip(shares, targets, strict=True)):
        source, order = sources[number], kept[number]
        if target is None:
            whole, part = divmod(share.weight, 1.0)
            count = round(part * len(order))
        else:
            whole, rest = divmod(target, tokens[number]) if tokens[number] else (0.0, 0.0)
            count = _nearest(lengths[number][order], rest)
        first = np.sort(source[order[:count]])
        all_of_it = np.sort(source[order])
        taken = np.concatenate([*[all_of_it] * int(whole), first])
        left = np.sort(source[order[count:]]) if not int(whole) else source[:0]
        drawn.append(Drawn(taken, np.sort(source[orders[number][len(order) :]]), left))
    return drawn


def _capped(rows: Int64Array, lengths: Int32Array, share: SourceShare) -> int:
    """How many samples, in the order of their ranks, are within both caps; whole rows."""
    ends = np.flatnonzero(np.append(rows[1:] != rows[:-1], True)) + 1 if len(rows) else np.zeros(0, np.int64)
    allowed = len(ends)
    if share.max_rows is not None:
        allowed = min(allowed, share.max_rows)
    if share.max_tokens is not None and len(ends):
        at_end = np.cumsum(lengths, dtype=np.int64)[ends - 1]
        allowed = min(allowed, int(np.searchsorted(at_end, share.max_tokens, side="right")))
    return int(ends[allowed - 1]) if allowed else 0


def _targets(tokens: Sequence[int], shares: Sequence[SourceShare], epoch_tokens: int | None) -> list[float | None]:
    """Tokens that each data set is to give; None for those that go by their weight alone."""
    asked = sum(share.token_share or 0.0 for share in shares)
    if not asked:
        return [None] * len(shares)
    weighed = [
        share.weight * count if share.token_share is None else 0.0 for share, count in zip(shares, tokens, strict=True)
    ]
    total = float(epoch_tokens if epoch_tokens is not None else sum(tokens))
    rest = max(0.0, 1.0 - asked) * total
    return [
        share.token_share * total if share.token_share is not None else rest * weight / (sum(weighed) or 1.0)
        for share, weight in zip(shares, weighed, strict=True)
    ]


def _nearest(lengths: Int32Array, target: float) -> int:
    """How many of the first samples come nearest to `target` tokens."""
    sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return int(np.argmin(np.abs(sums - target)))
