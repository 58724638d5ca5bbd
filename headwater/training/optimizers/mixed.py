"""Two optimizers as one: the first for hidden matrices, the second for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from headwater.training.optimizers.state import check_shares


class Mixed(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for embeddings, heads, norms and biases, as Muon is meant to be used (Jordan et al. 2024,
    https://github.com/KellerJordan/Muon; Liu et al. 2025, arXiv:2502.16982); or any other two.

    With `adjust_lr_fn: match_rms_adamw` Muon's steps are as large as AdamW's (section 2.2 of the latter), and one learning rate
    serves both.

    Args:
        params: groups of `headwater.training.groups`; those that are "hidden" go to the first.
        hidden: for matrices that lead from features to features; None = Muon with AdamW's size of steps.
        rest: for all other parameters; None = AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        hidden: OptimizerCallable | None = None,
        rest: OptimizerCallable | None = None,
    ) -> None:
        groups = list(params)
        first, second = ([g for g in groups if g.get("hidden", False) is kind] for kind in (True, False))
        if not first or not second:
            raise ValueError(
                f"found {len(first)} groups of hidden matrices and {len(second)} others; expected both, as `Groups` makes them. "
                "Take one optimizer for all instead"
            )
        self.inner = {True: (hidden or muon)(first), False: (rest or torch.optim.AdamW)(second)}
        for made in self.inner.values():
            check_inner(made, self)
        super().__init__(groups, {})  # the dicts are those of the inner optimizers, which have put their defaults in
        self.defaults = {name: value for made in self.inner.values() for name, value in made.defaults.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for kind, inner in self.inner.items():
            inner.state = self.state  # loading a checkpoint replaces both
            inner.param_groups = [group for group in self.param_groups if group.get("hidden", False) is kind]
            inner.step()
        return loss


def muon(params: Iterable[Any]) -> torch.optim.Optimizer:
    """torch's Muon with steps of AdamW's size."""
    return torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw")


def check_inner(inner: torch.optim.Optimizer, outer: torch.optim.Optimizer) -> None:
    """ValueError for schedule-free optimizers, whose parameters mean two things, and for those that cannot work on shares."""
    check_shares(inner)
    if hasattr(inner, "eval"):
        raise ValueError(
            f"{type(inner).__name__} has modes of training and evaluation; use it alone, not in {type(outer).__name__}"
        )
