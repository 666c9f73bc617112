"""A tokenizer whose plain batch calls go through the fast encoder, and everything else to the tokenizer itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eft.core.records import Int32Array, Int64Array
from eft.data.turns import Span

if TYPE_CHECKING:  # numba is slow to import, and not needed by those who only ask whether they have one of these
    from eft.data.bpe import Encoded, FastEncoder

_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


class FastTokenizer:
    """Stands in for a fast tokenizer while rows are prepared: same ids and, token by token, the same characters.

    `tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)` with a list of texts gives
    `input_ids` as lists, with `return_offsets_mapping=True` as int32 arrays beside `offset_mapping`, int64 [tokens, 2].
    The offsets join up: a token of blanks is not left out of them, as it is by some tokenizers.
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
        with_offsets = bool(options.get("return_offsets_mapping"))
        others = {name: value for name, value in options.items() if name != "return_offsets_mapping"}
        if not isinstance(text, list) or others != _PLAIN:
            return self.tokenizer(text, **options)
        able = self.encoder.can_encode(self.encoder.batch(text))
        rest = [each for each, is_able in zip(text, able, strict=True) if not is_able]
        reference = self.tokenizer(rest, **options) if rest else {"input_ids": [], "offset_mapping": []}
        ours = self._encoded([each for each, is_able in zip(text, able, strict=True) if is_able], with_offsets)
        names = ("input_ids", "offset_mapping") if with_offsets else ("input_ids",)
        result: dict[str, list[Any]] = {name: [] for name in names}
        theirs = zip(*(reference[name] for name in names), strict=True)
        for is_able in able:
            for name, value in zip(names, next(ours) if is_able else next(theirs), strict=True):
                result[name].append(value)
        return result

    def labelled(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None], special_ids: Int64Array
    ) -> list[tuple[Int32Array, Int32Array] | None]:
        """Ids and labels of texts whose spans (None: everything) are trained; as `alignment.labelled` gives them.

        None for a text that this cannot do: the encoder does not take it, a span has a weight, spans meet.
        """
        batch = self.encoder.batch(texts)
        able = [is_able and _is_simple(own) for is_able, own in zip(self.encoder.can_encode(batch), spans, strict=True)]
        if not all(able):
            batch = self.encoder.batch(list(compress(texts, able)))
        places: list[tuple[int, int]] = []
        span_ends: list[int] = []
        start = 0
        for stop, own in zip(batch.ends.tolist(), compress(spans, able), strict=True):
            if own is None:
                places.append((start, stop))
            else:
                places += [(start + span.start, start + span.stop) for span in own]
            span_ends.append(len(places))
            start = stop
        encoded = self.encoder.encode(batch)
        in_batch = np.array(places, dtype=np.int64).reshape(-1, 2)
        labels = self.encoder.labels(batch, encoded, in_batch, np.array(span_ends, dtype=np.int64), special_ids)
        parts = iter([(encoded.ids[a:b], labels[a:b]) for a, b in pairwise([0, *encoded.ends.tolist()])])
        return [next(parts) if is_able else None for is_able in able]

    def _encoded(self, texts: list[str], with_offsets: bool) -> Any:
        encoded = self.encoder.encode(self.encoder.batch(texts))
        bounds = list(pairwise([0, *encoded.ends.tolist()]))
        if not with_offsets:
            ids = encoded.ids.tolist()
            return iter([(ids[start:stop],) for start, stop in bounds])
        offsets = self._offsets(texts, encoded)
        return iter([(encoded.ids[start:stop], offsets[start:stop]) for start, stop in bounds])

    def _offsets(self, texts: Sequence[str], encoded: Encoded) -> npt.NDArray[np.int64]:
        """Characters of each token in its own text, int64 [tokens, 2]; a part of a character counts as all of it."""
        joined = "".join(texts)
        sizes = self.encoder.byte_lengths[encoded.ids]
        stops = np.cumsum(sizes, dtype=np.int64)
        offsets = np.stack([stops - sizes, stops], axis=1)
        if not joined.isascii():
            buffer = np.frombuffer(joined.encode(), dtype=np.uint8)
            character: Int64Array = np.cumsum((buffer & 0xC0) != 0x80, dtype=np.int64) - 1
            offsets = np.stack([character[offsets[:, 0]], character[offsets[:, 1] - 1] + 1], axis=1)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        per_text = np.diff(encoded.ends, prepend=0)
        return offsets - np.repeat(np.cumsum(lengths) - lengths, per_text)[:, None]


def _is_simple(spans: Sequence[Span] | None) -> bool:
    """Whether the spans have no weights and are ascending and apart."""
    if spans is None:
        return True
    return all(span.weight == 1.0 and span.start < span.stop for span in spans) and all(
        before.stop <= after.start for before, after in pairwise(spans)
    )
