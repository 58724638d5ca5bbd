"""GaLore: the state of an optimizer in a space of fewer dimensions than its gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from headwater import distributed
from headwater.training.optimizers.mixed import check_inner
from headwater.training.optimizers.state import keep_types

OWN = ("count", "projector")  # what is kept of a parameter beside the inner optimizer's state


def long_first(x: Tensor) -> Tensor:
    """A matrix lying on its shorter side: (m, n) or its transpose -> (long, short)."""
    return x if x.shape[0] >= x.shape[1] else x.mT


def directions(gradient: Tensor, rank: int) -> Tensor:
    """The first singular vectors of a gradient on its shorter side: (m, n) -> (short, rank), rank at most short.

    Each has its largest number positive: moments that outlive a projector would else change sign with the whim of the solver.
    """
    exact = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
    found = torch.linalg.svd(long_first(gradient.to(exact)), full_matrices=False).Vh[:rank]
    sign = found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    return (sign * found).mT.contiguous().to(gradient.dtype)


def project(gradient: Tensor, directions: Tensor) -> Tensor:
    """(m, n), (short, rank) -> (long, rank); as shares of its rows where the gradient is shared out."""
    if not isinstance(gradient, DTensor):
        return long_first(gradient) @ directions
    low: Any = long_first(gradient) @ everywhere(directions, gradient)
    return low.redistribute(placements=[Shard(0)])


def restore(step: Tensor, directions: Tensor, p: Tensor) -> Tensor:
    """The way back: (long, rank), (short, rank) -> the shape, and the shares, of p."""
    if not isinstance(p, DTensor):
        return step @ directions.mT if p.shape[0] >= p.shape[1] else directions @ step.mT
    whole: Any = step @ everywhere(directions, p).mT
    return (whole if p.shape[0] >= p.shape[1] else whole.mT).redistribute(placements=p.placements)


def everywhere(x: Tensor, like: DTensor) -> DTensor:
    """A tensor that all ranks have, beside one of which each has a share."""
    return DTensor.from_local(x, like.device_mesh, [Replicate()], run_check=False)


def galore_numbers(shape: tuple[int, int], rank: int, moments: int = 2) -> int:
    """How many numbers GaLore keeps of a matrix: m r for the projector, n r for each moment, m <= n (table 1 of the paper)."""
    short, long = sorted(shape)
    return short * rank + moments * long * rank


class GaLore(torch.optim.Optimizer):
    """Any element-wise optimizer, with hidden matrices in the space of their gradients' first singular vectors (Zhao et al. 2024,
    arXiv:2403.03507, algorithm 2; https://github.com/jiaweizzhao/GaLore).

    The gradient (m, n) becomes (n, r) by a projector (m, r) on its shorter side; the inner optimizer sees that alone; its step
    comes back into the full space times `scale`. Embeddings, heads and vectors take its ordinary steps. Weight decay of projected
    matrices is decoupled. AdamW8bit as the inner optimizer gives 8-bit GaLore.

    Updating layer by layer during backward is left out: clipping by the norm of the whole gradient, and skipping bad steps, need
    all gradients first.

    Args:
        params: groups of `headwater.training.groups`, of which "hidden" ones are projected.
        inner: made from the same groups; None = AdamW with a learning rate of 0.01. Several times the rate of AdamW alone is usual,
            for steps in the projected space shrink by `scale`.
        rank: r, or below 1 its share of the shorter side.
        every: steps between new projectors (T).
        scale: alpha.
        reset: forget the moments whenever the projector changes; False = they live on in the new space, as in the paper.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        inner: OptimizerCallable | None = None,
        rank: float = 0.25,
        every: int = 200,
        scale: float = 0.25,
        reset: bool = False,
    ) -> None:
        if rank <= 0 or (rank > 1 and rank != int(rank)) or every < 1 or scale <= 0:
            raise ValueError(
                f"found rank {rank}, every {every}, scale {scale}; expected a whole rank or a share below 1, the others above 0"
            )
        groups = list(params)
        if not any(group.get("hidden") for group in groups):
            raise ValueError("found no group of hidden matrices to project; expected groups as `Groups` makes them")
        self.inner, self.reset = torch.optim.AdamW(groups, lr=1e-2) if inner is None else inner(groups), reset
        check_inner(self.inner, self)
        if isinstance(self.inner, torch.optim.Adafactor):
            raise ValueError(
                "found torch's Adafactor, whose steps are as large as the parameter, which is zero in the projected space; take "
                "timm.optim.Adafactor with a learning rate"
            )
        own = {"rank": rank, "every": every, "scale": scale}
        for group in groups:
            group |= own | group if group.get("hidden") else {}
        super().__init__(groups, {})  # the dicts are those of the inner optimizer, which has put its defaults in
        self.defaults = {**self.inner.defaults, **own}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the inner optimizer: of zeros in the projected space for hidden matrices, of the others as they are."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        seen, moved, state = [], [], defaultdict[Tensor, dict[str, Any]](dict)
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if group.get("hidden"):
                low = [self._project(p, group) for p in learning]
                moved += [(p, x, group) for p, x in zip(learning, low, strict=True)]
                state |= {x: {k: v for k, v in self.state[p].items() if k not in OWN} for p, x in zip(learning, low, strict=True)}
                seen.append({**group, "params": low, "weight_decay": 0.0})
            else:
                state |= {p: self.state[p] for p in learning}
                seen.append({**group, "params": learning})
        self.inner.param_groups, self.inner.state = seen, state
        self.inner.step()
        for p, x, group in moved:
            self.state[p] |= state[x]
            p.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
            p.add_(restore(x, self.state[p]["projector"], p), alpha=group["scale"])
        self.inner.param_groups, self.inner.state = self.param_groups, self.state  # so that nothing holds the zeros any longer
        return loss

    def _project(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Zeros that stand for a matrix in the projected space, with its gradient there."""
        assert p.grad is not None
        state = self.state[p]
        state["count"] = state.get("count", -1) + 1
        if state["count"] % group["every"] == 0:
            if self.reset:
                self.state[p] = state = {"count": state["count"]}
            short = min(p.shape)
            rank = max(1, min(short, round(group["rank"] * short) if group["rank"] < 1 else int(group["rank"])))
            state["projector"] = agreed(directions(p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad, rank))
        low = project(p.grad, state["projector"])
        x = torch.zeros_like(low)
        x.grad = low
        return x

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of the inner optimizer has types of its own."""
        super().load_state_dict(state_dict)
        keep_types(self, state_dict)


def agreed(x: Tensor) -> Tensor:
    """The first rank's: near ties of singular values may fall differently on different devices."""
    if distributed.world() > 1:
        dist.broadcast(x, 0)
    return x
