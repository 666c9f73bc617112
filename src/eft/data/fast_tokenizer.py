"""A tokenizer whose plain batch calls go through the fast encoder, and everything else to the tokenizer itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from eft.core.records import TokenSample
from eft.data.alignment import exact_offsets, labelled
from eft.data.token_facts import TokenizerFacts
from eft.data.turns import Span

if TYPE_CHECKING:  # numba is slow to import, and not needed by those who only ask whether they have one of these
    from eft.data.bpe import FastEncoder

_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


class FastTokenizer:
    """Stands in for a fast tokenizer while rows are prepared, and gives the same ids.

    `tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)` with a list of texts is
    what the fast encoder does; texts that it does not take go to the tokenizer.
    """

    def __init__(self, tokenizer: Any, encoder: FastEncoder):
        self.tokenizer = tokenizer
        self.encoder = encoder

    def __getattr__(self, name: str) -> Any:
        if name in ("tokenizer", "encoder"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: Any, **options: Any) -> Any:
        if not isinstance(text, list) or options != _PLAIN:
            return self.tokenizer(text, **options)
        able = self.encoder.can_encode(self.encoder.batch(text))
        rest = [each for each, is_able in zip(text, able, strict=True) if not is_able]
        theirs = iter(self.tokenizer(rest, **options)["input_ids"] if rest else ())
        encoded = self.encoder.encode(self.encoder.batch(list(compress(text, able))))
        ids = encoded.ids.tolist()
        ours = iter([ids[start:stop] for start, stop in pairwise([0, *encoded.ends.tolist()])])
        return {"input_ids": [next(ours if is_able else theirs) for is_able in able]}

    def labelled(
        self, texts: Sequence[str], spans: Sequence[list[Span] | None], facts: TokenizerFacts
    ) -> list[TokenSample | None]:
        """The samples of texts whose spans (None: everything) are trained, as `alignment.labelled` gives them; None for
        a text that the encoder does not take."""
        batch = self.encoder.batch(texts)
        able = self.encoder.can_encode(batch)
        if not all(able):
            batch = self.encoder.batch(list(compress(texts, able)))
        places: list[int] = []
        span_ends: list[int] = []
        simple: list[bool] = []
        start = 0
        for stop, own in zip(batch.ends.tolist(), compress(spans, able), strict=True):
            # The spans have no weights and are ascending and apart.
            is_simple, reached = True, 0
            if own is None:
                places += (start, stop)
            else:
                for first, last, weight in own:
                    if weight != 1.0 or first >= last or first < reached:
                        is_simple = False
                        break
                    reached = last
                if is_simple:
                    for first, last, _ in own:
                        places += (start + first, start + last)
            simple.append(is_simple)
            span_ends.append(len(places) // 2)
            start = stop
        encoded = self.encoder.encode(batch)
        in_batch = np.array(places, dtype=np.int64).reshape(-1, 2)
        ends = np.array(span_ends, dtype=np.int64)
        labels = self.encoder.labels(batch, encoded, in_batch, ends, facts.special_ids)
        parts = iter(zip(pairwise([0, *encoded.ends.tolist()]), simple, strict=True))
        samples: list[TokenSample | None] = []
        for text, own, is_able in zip(texts, spans, able, strict=True):
            if not is_able:
                samples.append(None)
                continue
            (first, last), is_simple = next(parts)
            ids = encoded.ids[first:last]
            if is_simple:
                samples.append(TokenSample(ids, labels[first:last]))
            else:
                samples.append(labelled(ids, exact_offsets(ids, (), text, facts), own, facts))
        return samples
