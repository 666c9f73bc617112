"""Rounding to fewer bits that loses nothing of a small change on average."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def round_stochastically(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value` (fp32) in `dtype`: the nearer of its two neighbours mostly, the other one as often as it is near.

    Rounding to the nearest takes away every change below half a spacing of a base that already is in `dtype`, and all
    of it in the same direction: a low-rank change loses a part of itself. Here the expected value is `value`, what
    `dtype` holds exactly stays, and the errors are independent. The draws depend on `name` alone.
    """
    near = value.to(dtype)
    if dtype == value.dtype:
        return near
    draw = torch.rand(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    error = value - near.float()
    return torch.where(draw * _spacing(near, error) < error.abs(), _neighbour(near, error), near)


def is_rounded(saved: Tensor, value: Tensor) -> bool:
    """Whether every element of `saved` is `value` (fp32) rounded to one of its neighbours in the dtype of `saved`."""
    near = value.to(saved.dtype)
    error = value - near.float()
    return bool(((saved == near) | ((saved == _neighbour(near, error)) & (error != 0))).all())


def _spacing(near: Tensor, direction: Tensor) -> Tensor:
    """Distance, fp32, from `near` to the next number of its dtype in `direction`."""
    return (_neighbour(near, direction).float() - near.float()).abs()


def _neighbour(near: Tensor, direction: Tensor) -> Tensor:
    return torch.nextafter(near, torch.where(direction > 0, torch.inf, -torch.inf).to(near.dtype))
