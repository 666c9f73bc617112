"""torch's Muon for hidden matrices and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) makes a matrix's momentum orthogonal. That is meant for matrices between hidden states: not
for embeddings, output heads, norms, biases, or the thin factors of an adapter. torch scales the update by shape; with
`match_rms_adamw` (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4) its size is that of AdamW's, so that one
`learning_rate` holds for both.
"""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW, Muon, Optimizer

from eft.core.errors import ModelError
from eft.optim.roles import Member

IS_MUON = "orthogonal"
"""Entry of a group: Muon updates it."""


def muon_part(member: Member, *, head: bool = False, adapter_factors: bool = False) -> tuple[str, dict[str, Any]]:
    """Which rule updates a parameter, as `param_groups` takes it; `head` and `adapter_factors` give Muon these too."""
    allowed = {"matrix": True, "head": head, "adapter factor": adapter_factors}
    orthogonal = member.parameter.ndim == 2 and allowed.get(member.role, False)
    return ("muon" if orthogonal else "adamw"), {IS_MUON: orthogonal}


class MuonWithAdamW(Optimizer):
    """Both rules over one set of groups and one state: schedules and checkpoints see an ordinary optimizer."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        """`params`: groups that say by `IS_MUON` which rule is theirs.

        Raises:
            ModelError: there is no matrix for Muon.
        """
        super().__init__(params, {"lr": lr})
        orthogonal, others = _split(self.param_groups)
        if not orthogonal:
            raise ModelError(
                "optimizer: muon has no hidden matrix to update (embeddings, heads, norms, biases and adapter factors "
                "are not its business); use adamw_torch_fused, or for an adapter `optim_args: {adapter_factors: true}`."
            )
        # The rules fill in their own settings, in the very dicts of `param_groups`.
        options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self._muon = Muon(orthogonal, lr, **options)  # type: ignore[arg-type]  # values of several types
        self._adamw = AdamW(others, lr, betas, eps) if others else None

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no closure to return a loss
        """One update of every parameter that has a gradient."""
        assert closure is None, "no optimizer here evaluates the loss again"
        # Somebody may step over other groups, or have loaded other state, in between.
        orthogonal, others = _split(self.param_groups)
        for rule, groups in ((self._muon, orthogonal), (self._adamw, others)):
            if rule is not None and groups:
                rule.param_groups, rule.state = groups, self.state
                rule.step()  # type: ignore[no-untyped-call]  # torch's Muon has no types


def _split(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [group for group in groups if group[IS_MUON]], [group for group in groups if not group[IS_MUON]]
