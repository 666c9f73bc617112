"""The rate of a matrix product on this machine, now: the yardstick of MFU. On some machines it moves within minutes."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

ROWS, INNER, COLUMNS = 2048, 1024, 8192


def gemm_rate(dtype: torch.dtype, device: str, threads: int, seconds: float = 0.7) -> float:
    """Floating-point operations per second of [2048, 1024] × [1024, 8192], the best of repeats over `seconds`."""
    torch.set_num_threads(threads)
    size = 4 if device == "cuda" else 1  # 2048 rows do not fill a GPU
    a = torch.randn(size * ROWS, size * INNER, dtype=dtype, device=device)
    b = torch.randn(COLUMNS, size * INNER, dtype=dtype, device=device)
    best, done = float("inf"), 0
    repeats = 20 if device == "cuda" else 1
    F.linear(a, b)
    end = time.perf_counter() + seconds
    while done < 3 or time.perf_counter() < end:
        done += 1
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            F.linear(a, b)
        _wait(device)
        best = min(best, (time.perf_counter() - started) / repeats)
    return 2.0 * a.shape[0] * a.shape[1] * COLUMNS / best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
