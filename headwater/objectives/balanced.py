"""Terms that keep sparse experts evenly loaded, beside any objective.

The load-balancing term of Switch (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6) and the z-term of ST-MoE (Zoph et
al. 2022, arXiv:2202.08906, equation 5). Loads are counted over all ranks, as Qiu et al. 2025 (arXiv:2501.11873) advise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater import distributed
from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, Term, wide
from headwater.objectives.wrapped import Wrapped


class Sums(NamedTuple):
    """Of one router's T tokens: choices (E,) that each expert got; probability (E,) and z () summed over tokens."""

    tokens: Tensor
    choices: Tensor
    probability: Tensor
    z: Tensor


def sums(logits: Tensor, chosen: Tensor) -> Sums:
    """logits: (T, E); chosen: (T, K) numbers of the experts that were taken."""
    logits = wide(logits)
    count = chosen.flatten().bincount(minlength=logits.shape[-1])
    tokens = torch.tensor(len(logits), device=logits.device)
    return Sums(tokens, count, logits.softmax(-1).sum(0), logits.logsumexp(-1).square().sum())


def balance(count: Tensor, probability: Tensor) -> Tensor:
    """E * sum over experts of (share of choices) * (summed probability); per token it is 1 when all are used alike.

    count: (E,) over all ranks, without gradient; probability: (E,) of this rank's tokens.
    """
    return len(count) * (count / count.sum().clamp(min=1) * probability).sum()


class Balanced(Wrapped):
    """Adds to an objective, for all passes through routers that it makes, the mean balance term and the mean z-term.

    The shares of choices are those of all ranks, so that N ranks equal one process. A batch that is cut into micro-batches is
    balanced piece by piece.

    Args:
        model: has a fusion with learned routing (`Routed`).
        inner: any objective, a weighted sum too.
        weight: of the balance term.
        z_weight: of the z-term, which keeps router scores small.
    """

    def __init__(self, model: Model, inner: Callable[[Model], Objective], weight: float = 0.01, z_weight: float = 0.001) -> None:
        super().__init__(model, inner)
        if not routers(model):
            raise ValueError(
                "found no router in the model; give it a fusion with experts, for example Routed, or leave Balanced out"
            )
        self.weight, self.z_weight = weight, z_weight
        self.coupled = True  # the share of choices is one of all samples

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        """Both terms count as many targets as the inner ones have together: how many tokens are routed, only the model knows."""
        inner = self.inner.numbers(batch)
        return inner | dict.fromkeys(("balance", "z"), torch.stack([n.long() for n in inner.values()]).sum())

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        found = routers(model)
        for router in found:
            router.routing = []
        try:
            terms = self.inner(model, batch)
            passes = [sums(*routing) for router in found for routing in router.routing]
        finally:
            for router in found:
                router.routing = None
        number = self.numbers(batch)["balance"]
        return terms | self._terms(passes, number)

    def _terms(self, passes: list[Sums], number: Tensor) -> dict[str, Term]:
        """Totals such that their sum over ranks, over the sum of numbers, is the mean over passes of the mean over tokens."""
        if not passes:  # the parts that this batch serves do not ask the fusion
            nothing = torch.zeros((), device=number.device)
            return {"balance": Term(nothing, number, self.weight), "z": Term(nothing, number, self.z_weight)}
        sizes = [1, *(1 + len(p.choices) for p in passes)]
        every = distributed.total(torch.cat([number[None], *(torch.cat([p.tokens[None], p.choices]) for p in passes)])).split(sizes)
        scale = [every[0][0] / len(passes) / whole[0].clamp(min=1) for whole in every[1:]]
        even = torch.stack([s * balance(whole[1:], p.probability) for s, p, whole in zip(scale, passes, every[1:], strict=True)])
        z = torch.stack([s * p.z for s, p in zip(scale, passes, strict=True)])
        busiest = torch.stack([whole[1:].max() / whole[1:].sum().clamp(min=1) for whole in every[1:]]).max()
        metrics = {"largest_share": busiest}
        return {"balance": Term(even.sum(), number, self.weight, metrics), "z": Term(z.sum(), number, self.z_weight)}


def routers(model: Model) -> list[Any]:
    """Modules that tell what they route: `routing` is a list of (logits, chosen) while someone listens, else None."""
    return [module for module in model.modules() if hasattr(module, "routing")]
