"""One entry of `datasets` from its rows to a token store, with an account of every row and token."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from itertools import islice

from eft.core.errors import DataError
from eft.data.block_encoder import BlockEncoder, Job, Tally
from eft.data.ledger import SourceLedger
from eft.data.sources import count_hint, iter_blocks, no_rows
from eft.data.store_writer import StoreWriter
from eft.data.tokenize import trains_on_inputs
from eft.data.workers import Workers

Progress = Callable[[str, int, int | None, str], None]
"""Called with (what, rows done, rows in all or None, speed) while rows are tokenised; `what` is the data set, `speed`
such as `5,600 rows/s, 1,600,000 tokens/s, 0:04:05 left`, empty at first."""

_SPEED_SHOWN_AFTER_S = 2.0


def write_entry(writer: StoreWriter, job: Job, workers: Workers | None, progress: Progress) -> Tally:
    """Tokenise what `writer` has not yet of all rows of `job.spec`, by `workers` or here; returns the account, before
    samples are split.

    Raises DataError for a malformed or over-long row where the config says so, for a data set that gives no sample, and
    for a chat mask that trains every token.
    """
    spec = job.spec
    tally = Tally(SourceLedger(name=spec.path))
    if writer.state is not None:
        tally = Tally.from_json(dict(writer.state))
    total = count_hint(spec)
    blocks = islice(iter_blocks(spec), writer.num_blocks, None)
    speed = _Speed(spec.path, tally, progress, total)
    encoded_blocks = map(BlockEncoder(job), blocks) if workers is None else workers.encode(job, blocks)
    for encoded in encoded_blocks:
        tally.add(encoded.tally)
        writer.append(encoded.rows, tally.to_json)
        speed.report()
    _require_samples(tally, len(writer), job)
    _require_context(tally, len(writer), job)
    return tally


class _Speed:
    """Tells the progress, with rows and tokens per second of this very run once they mean something."""

    def __init__(self, name: str, tally: Tally, progress: Progress, total: int | None):
        self._name, self._tally, self._progress, self._total = name, tally, progress, total
        self._start: tuple[float, int, int] | None = None
        """Time, rows and tokens of the first report: what comes before it is the start of the workers."""

    def report(self) -> None:
        account, now, speed = self._tally.account, time.monotonic(), ""
        if self._start is None:
            self._start = now, account.rows, account.raw
        passed = now - self._start[0]
        if passed > _SPEED_SHOWN_AFTER_S:
            rows, tokens = (account.rows - self._start[1]) / passed, (account.raw - self._start[2]) / passed
            speed = f"{rows:,.0f} rows/s, {tokens:,.0f} tokens/s"
            if self._total is not None and rows:
                speed += f", {timedelta(seconds=round(max(0, self._total - account.rows) / rows))} left"
        self._progress(self._name, account.rows, self._total, speed)


def _require_samples(tally: Tally, num_samples: int, job: Job) -> None:
    account, spec, cfg = tally.account, job.spec, job.cfg
    if num_samples:
        return
    if not account.rows:
        raise no_rows(spec)
    reasons = "; ".join(
        f"{portion.rows} {reason.replace('_', ' ')} (first: {portion.first_rows[0]})"
        for reason, portion in account.dropped.items()
    )
    message = f"{spec.path}: none of its {account.rows} rows can be trained on: {reasons}"
    untrained = account.dropped.get("no_trainable_tokens")
    if untrained is not None and untrained.tokens > untrained.rows * cfg.sequence_len:
        message += f". sequence_len is {cfg.sequence_len}, and what truncation keeps ends before the answers"
    elif untrained is not None and tally.is_chat:
        message += f". Roles in the rows: {_roles_text(tally)}; roles_to_train: {', '.join(spec.roles_to_train)}"
        message += " (`roles` maps the names in the rows to standard ones)"
    if "too_long" in account.dropped:
        message += f". sequence_len is {cfg.sequence_len}; excess_length_strategy: truncate keeps the start of each"
    if "too_short" in account.dropped:
        message += f". min_sample_len is {cfg.min_sample_len}"
    raise DataError(message)


def _roles_text(tally: Tally) -> str:
    return ", ".join(f"{role} ({count} turns)" for role, count in tally.roles.most_common()) or "none"


def _require_context(tally: Tally, num_samples: int, job: Job) -> None:
    """A mask that trains every token although some turns must not be trained has not been understood."""
    spec = job.spec
    if not tally.is_chat or tally.has_context or trains_on_inputs(spec, job.cfg):
        return
    if set(tally.roles) <= set(spec.roles_to_train):
        return
    raise DataError(
        f"{spec.path}: every token of all {num_samples} samples would be trained, prompts too. Roles in "
        f"the rows: {_roles_text(tally)}; roles_to_train: {', '.join(spec.roles_to_train)}. The chat template "
        "does not show where turns begin and end; use another one, or set `train_on_inputs: true` if this is meant"
    )
