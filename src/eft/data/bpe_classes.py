"""Which code points are letters, numbers, blanks, marks or digits, as the tokenizers library sees them.

The library is asked, so both go by the same Unicode tables; a chunk of code points at a time, with the first text that
has one of it: texts have few of them.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, pre_tokenizers

from eft.data import bpe_kernels as kernels

CODE_POINTS = 0x110000
_CHUNK = 0x800
"""Long texts take the library more than linear time."""


class PointClasses:
    """The class table of one tokenizer."""

    def __init__(self, *, digits: bool, marks: bool, normalizes: bool):
        """`digits`, `marks`: these classes are needed; `normalizes`: text is brought to NFC first."""
        self.table = np.full(CODE_POINTS, kernels.ODD, dtype=np.uint8)
        """Bits of `bpe_kernels`, uint8 [0x110000]. What is not known yet is ODD: left to the reference tokenizer."""
        self._kinds = {"digits": digits, "marks": marks, "normalizes": normalizes}
        self._learned: set[int] = set()
        self._own: list[tuple[int, int, int]] = []

    def add(self, first: int, stop: int, bits: int) -> None:
        """Give the code points [first, stop) these bits beside their classes; before anything is learned."""
        assert not self._learned
        self._own.append((first, stop, bits))

    def learn(self, points: npt.NDArray[np.uint32]) -> bool:
        """Learn the chunks that these code points are in; whether any of them is new."""
        new = set(np.flatnonzero(np.bincount(points // _CHUNK)).tolist()) - self._learned
        for chunk in new:
            self.table[chunk * _CHUNK : (chunk + 1) * _CHUNK] = _classes_of(chunk * _CHUNK, **self._kinds)
        for first, stop, bits in self._own:
            self.table[first:stop] |= bits
        self._learned |= new
        return bool(new)


@lru_cache(maxsize=1024)
def _classes_of(first: int, *, digits: bool, marks: bool, normalizes: bool) -> npt.NDArray[np.uint8]:
    """uint8 [_CHUNK]: the classes of a chunk."""
    table = np.zeros(_CHUNK, dtype=np.uint8)
    kinds = [(r"\p{L}+", kernels.LETTER), (r"\p{N}+", kernels.NUMBER), (r"\s+", kernels.SPACE)]
    for pattern, bit in [*kinds, (r"\p{M}+", kernels.MARK)] if marks else kinds:
        table[_points_where(pre_tokenizers.Split(Regex(pattern), "removed"), first, removed=True)] |= bit
    if digits:
        table[_points_where(pre_tokenizers.Digits(individual_digits=False), first, removed=False)] |= kernels.DIGIT
    if normalizes:
        # What Python's Unicode tables do not know, they cannot say to be normal.
        odd = [at for at in range(_CHUNK) if first + at >= 0x300 and unicodedata.category(chr(first + at)) == "Cn"]
        table[odd] |= kernels.ODD
    return table


def _points_where(splitter: Any, first: int, *, removed: bool) -> npt.NDArray[np.bool_]:
    """bool [_CHUNK]: the code points that `splitter` takes out, or those in its second, fourth … piece."""
    # Something that never matches leads, so that the first piece is known not to be a match.
    text = "\x00" + "".join(map(chr, range(first, first + _CHUNK)))
    inside = np.full(_CHUNK + 1, removed)
    for number, (_, (start, stop)) in enumerate(splitter.pre_tokenize_str(text)):
        if removed or number % 2:
            inside[start:stop] = not removed
    return inside[1:]
