"""Weights that are good for every source at once: short steps on one part after the other, whose sum is what the optimizer follows.

The gradient of a later part is taken where earlier ones have led, so that averaged over orders the sum holds, beside the plain
gradient, one that raises the inner products of the parts' gradients (Nichol et al. 2018, arXiv:1803.02999, section 5): of minima
with the same loss, it prefers those that parts share. Inner steps of one length that feed an outer optimizer are the idea of Nexus
("Same Pretraining Loss, Better Downstream Generalization via Common Minima").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.divided import Groups, Parts, divided, gradient
from headwater.objectives.handed import Handed
from headwater.objectives.objective import Batch, Objective, Schedule, at
from headwater.objectives.probe import Probe


class CommonMinima(Handed):
    """In every step the parts take turns, in an order that is drawn, and what they have moved together is handed over as gradient.

    It has the length of a usual gradient: with inner steps of length 0 and parts whose gradients are equally long it is their sum.

    Args:
        model: handed to the inner objective.
        inner: a `Weighted`, whose parts take turns, or an objective of several terms.
        stride: length of an inner step as a share of the length of all weights; a number or a schedule over the run.
        rounds: how often each part has its turn.
        groups: parts are groups of samples, such as sources, instead.
        seed: of the orders.
    """

    def __init__(
        self,
        model: Model,
        inner: Callable[[Model], Objective],
        stride: float | Schedule = 1e-3,
        rounds: int = 1,
        groups: Groups | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, inner)
        if rounds < 1 or (not callable(stride) and stride < 0):
            raise ValueError(f"found stride={stride} and rounds={rounds}; expected a stride of 0 or more, and 1 round or more")
        self.stride, self.rounds, self.groups, self.seed = stride, rounds, groups, seed

    def gradient(self, probe: Probe, model: Model, batch: Batch) -> list[Tensor]:
        parts = divided(probe, self.inner, model, batch, self.groups)
        drawn = random.uniform(torch.tensor(random.seed_of(self.seed, batch.get("step", 0))), (self.rounds, len(parts)), "order")
        order = [list(parts)[k] for turns in drawn.argsort(-1).tolist() for k in turns]
        length = at(self.stride, batch.get("progress", 0.0)) * float(probe.norm(probe.theta))
        moved, norms = displacement(probe, parts, order, length)
        if norms:
            probe.tell("moved", probe.norm(moved) / len(norms))  # 1 = all pull one way
        return [m * (sum(norms) / max(len(norms), 1) / self.rounds) for m in moved]


def displacement(probe: Probe, parts: Parts, order: list[str], length: float) -> tuple[list[Tensor], list[float]]:
    """Sum of the unit gradients g/|g| that parts have in this order, each taken `length` times the earlier ones downhill.

    Returns it, and |g| of those that are not zero. To second order in the length, with u and H of the start, it is
    sum_k u_k - length sum_k sum_(j < k) (I - u_k u_k^T) H_k u_j / |g_k|.
    """
    moved, norms = [torch.zeros_like(p) for p in probe.theta], list[float]()
    with probe.nudged(moved, 0.0):
        for name in order:
            found = gradient(probe, parts[name])
            norm = float(probe.norm(found))
            if norm == 0:
                continue  # nothing in this step is of this part
            norms.append(norm)
            moved = [m + g / norm for m, g in zip(moved, found, strict=True)]
            probe.move(found, -length / norm)
    return moved, norms
