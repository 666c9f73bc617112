"""Optimizers of bitsandbytes, with 8-bit state in blocks that share a scale; on CUDA also with state that can be paged.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". On a CPU nothing is paged, so the classes without
paging are built in place of the others: the same kernels, the same state, the same numbers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from bitsandbytes import functional, optim
from torch import Tensor, nn

_BLOCK = 256
"""Numbers with a scale of their own."""
_SMALLEST_PAGED = 100_000
"""Numbers; smaller tensors are not worth a page."""
_MAP_BYTES = 1024
"""The table of the 256 values that 8 bits stand for."""


class _BlockWise:
    """Mixed in front of an optimizer of bitsandbytes: how much it keeps."""

    bits: ClassVar[int]
    moments: ClassVar[tuple[int, ...]]
    """Tensors of the parameter's size in each state entry."""
    args: Any

    def state_bytes(self, parameter: nn.Parameter, group: dict[str, Any]) -> int:
        """Bytes of the state of `parameter`."""
        numbers = parameter.numel()
        if self.bits == 32 or numbers < self.args.min_8bit_size:
            return 4 * numbers * sum(self.moments)
        blocks = -(-numbers // _BLOCK)
        return sum(count * (numbers + 4 * blocks) + _MAP_BYTES for count in self.moments)


class _Paged(_BlockWise):
    """The same for state in memory that CUDA moves to the host and back by itself."""

    param_groups: list[dict[str, Any]]
    state: Any
    page_mng: Any

    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; state out of a checkpoint is put into such memory."""
        assert closure is None, "no optimizer here evaluates the loss again"
        for group in self.param_groups:
            for parameter in group["params"]:
                entries = self.state.get(parameter, {})
                for name in ("state1", "state2"):
                    if name in entries and not _is_paged(entries[name]):
                        entries[name] = self._paged(entries[name])
        super().step()  # type: ignore[misc]  # an optimizer comes next in the order of bases

    def _paged(self, value: Tensor) -> Tensor:
        paged: Tensor = functional.get_paged(*value.shape, dtype=value.dtype, device=value.device)
        paged.copy_(value)
        self.page_mng.paged_tensors.append(paged)
        return paged


def _is_paged(value: Tensor) -> bool:
    # bitsandbytes marks its paged tensors so, and leaves small ones where they are.
    return value.numel() < _SMALLEST_PAGED or getattr(value, "is_paged", False)


class AdamW8bit(_BlockWise, optim.AdamW8bit):
    """AdamW with 8-bit moments."""

    bits, moments = 8, (1, 1)


class PagedAdamW8bit(_Paged, optim.PagedAdamW8bit):
    """The same, paged."""

    bits, moments = 8, (1, 1)


class AdamW32bit(_BlockWise, optim.AdamW32bit):
    """AdamW."""

    bits, moments = 32, (1, 1)


class PagedAdamW32bit(_Paged, optim.PagedAdamW32bit):
    """The same, paged."""

    bits, moments = 32, (1, 1)


class Lion8bit(_BlockWise, optim.Lion8bit):
    """Lion with an 8-bit momentum."""

    bits, moments = 8, (1,)


class PagedLion8bit(_Paged, optim.PagedLion8bit):
    """The same, paged."""

    bits, moments = 8, (1,)


class Lion32bit(_BlockWise, optim.Lion32bit):
    """Lion."""

    bits, moments = 32, (1,)


class PagedLion32bit(_Paged, optim.PagedLion32bit):
    """The same, paged."""

    bits, moments = 32, (1,)


class AdEMAMix8bit(_BlockWise, optim.AdEMAMix8bit):
    """AdEMAMix with 8-bit moments."""

    bits, moments = 8, (2, 1)


class PagedAdEMAMix8bit(_Paged, optim.PagedAdEMAMix8bit):
    """The same, paged."""

    bits, moments = 8, (2, 1)


class AdEMAMix32bit(_BlockWise, optim.AdEMAMix32bit):
    """AdEMAMix."""

    bits, moments = 32, (2, 1)


class PagedAdEMAMix32bit(_Paged, optim.PagedAdEMAMix32bit):
    """The same, paged."""

    bits, moments = 32, (2, 1)


class RMSprop8bit(_BlockWise, optim.RMSprop8bit):
    """RMSprop with an 8-bit second moment."""

    bits, moments = 8, (1,)


class RMSprop32bit(_BlockWise, optim.RMSprop32bit):
    """RMSprop."""

    bits, moments = 32, (1,)
