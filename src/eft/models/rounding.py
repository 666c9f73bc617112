"""Rounding to fewer bits that loses nothing of a small change."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_CHUNK = 1 << 18
"""Elements rounded at a time."""
_HALVINGS = 20
_JITTER = 1e-2
"""Of a share: tells equal ones apart, so that of many equal elements the right number goes the other way."""


def round_keeping_change(value: Tensor, base: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value` (fp32) in `dtype`, each element one of its two neighbours, so that no row loses its change from `base`.

    Rounding to the nearest takes away every change below half a spacing of a base that already is in `dtype`, and all
    of it in the same direction: a low-rank change loses a part of itself. Rounding at random keeps it on average, with
    much noise. Here a row first is rounded to the nearest. Then those of its elements that lie nearest to the middle
    between their neighbours go the other way, if that is the way of the change, until ⟨rounded - base, change⟩ =
    ‖change‖²: all of the change with little noise, since such elements give the most of it for what they cost. What
    `dtype` holds exactly stays. Ties are broken by draws that depend on `name` alone.

    `base`: fp32, of the shape of `value`. Rows are the last dimension.
    """
    if dtype == value.dtype:
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rounded = torch.empty(value.shape, dtype=dtype)
    rows, old, new = (tensor.reshape(-1, value.shape[-1]) for tensor in (value, base, rounded))
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        new[part] = _rounded(rows[part], old[part], dtype, generator)
    return rounded


def _rounded(value: Tensor, base: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[rows, columns]."""
    near, change = value.to(dtype), value - base
    error = value - near.float()
    other = _neighbour(near, error)
    move = other.float() - near.float()
    gain = move * change
    share = error.abs() / move.abs()
    share *= 1 + _JITTER * torch.rand(share.shape, generator=generator)
    share[(gain <= 0) | (error == 0)] = 0.0
    lost = (error * change).sum(dim=1, keepdim=True)
    low, high = torch.zeros_like(lost), torch.full_like(lost, (1 + _JITTER) / 2)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = torch.where(share > middle, gain, 0.0).sum(dim=1, keepdim=True) >= lost
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(share > high, other, near)


def is_rounded(saved: Tensor, value: Tensor) -> bool:
    """Whether every element of `saved` is `value` (fp32) rounded to one of its neighbours in the dtype of `saved`."""
    near = value.to(saved.dtype)
    error = value - near.float()
    return bool(((saved == near) | ((saved == _neighbour(near, error)) & (error != 0))).all())


def _neighbour(near: Tensor, direction: Tensor) -> Tensor:
    return torch.nextafter(near, torch.where(direction > 0, torch.inf, -torch.inf).to(near.dtype))
