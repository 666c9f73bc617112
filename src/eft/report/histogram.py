"""How many samples have which length: bars of plain HTML, so that they stretch to any width and stay legible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from eft.report.markup import Markup, element, escape, join

BARS = 48


def histogram(title: str, lengths: npt.NDArray[Any], trained: npt.NDArray[Any], capacity: int) -> Markup:
    """A figure with a bar per range of lengths, its trained share in colour.

    Args:
        title: what stands over it.
        lengths: tokens of each sample, [samples].
        trained: trainable tokens of each sample, [samples].
        capacity: the longest sample that is possible.
    """
    width = max(1, math.ceil(int(lengths.max()) / BARS))
    number = np.asarray(lengths - 1) // width
    counts = np.bincount(number)
    tokens = np.maximum(np.bincount(number, weights=lengths), 1)
    shares = np.bincount(number, weights=trained) / tokens
    highest = counts.max()
    bars = (
        element(
            "i",
            element("b", style=f"height:{100 * share:.1f}%"),
            style=f"height:{100 * count / highest:.2f}%",
            title=f"{index * width + 1:,} to {(index + 1) * width:,} tokens: {count:,} samples, {share:.0%} trained",
        )
        for index, (count, share) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True))
    )
    middle, high = np.quantile(lengths, [0.5, 0.95])
    note = f"median {middle:,.0f}, 95 % at most {high:,.0f}, longest {int(lengths.max()):,} of {capacity:,} tokens"
    caption = element("figcaption", element("h3", escape(title) + element("small", escape(note))))
    edge = len(counts) * width
    ends = element("div", element("span", "1") + element("span", escape(f"{edge:,} tokens")), class_="ends")
    top = element("span", escape(f"{highest:,} samples"), class_="top")
    words = "Dark: the trained share of the tokens in each bar."
    body = top + element("div", join(bars), class_="bars", role="img", aria_label=f"{title}: {note}")
    return element("figure", caption + body + ends + element("p", words, class_="key"), class_="chart lengths")
