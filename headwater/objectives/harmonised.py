"""Gradients of parts of a loss that pull against each other are made to agree before the learner follows their sum.

Parts are objectives, terms such as the pairs of a contrastive loss, or sources of data. All that the rules want to know of
gradients is their inner products, so a rule is a small function of a Gram matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from headwater import distributed, random
from headwater.model import Model
from headwater.objectives.divided import Groups, divided, gradient
from headwater.objectives.handed import Handed
from headwater.objectives.objective import Batch, Objective
from headwater.objectives.probe import Probe

Unit = Literal["model", "block", "parameter"]


def projected(gram: Tensor, order: Tensor) -> Tensor:
    """Every gradient loses, in turn, its part along each other one that it conflicts with; then they are summed.

    PCGrad (Yu et al. 2020, arXiv:2001.06782, algorithm 1). For two it is the realignment of video-audio and video-text gradients
    of Wu et al. 2022 (arXiv:2211.02077), behind which neither has a negative inner product with the other.

    Args:
        gram: (..., K, K) inner products of K gradients.
        order: (K, K), row k: the order in which gradient k meets the others.

    Returns:
        (..., K) coefficients of the sum.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1)
    made = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram).clone()
    for k, others in enumerate(order.tolist()):
        for other in others:
            if other != k:
                conflict = (made[..., k, :] * gram[..., :, other]).sum(-1).clamp(max=0)
                made[..., k, other] -= conflict / norms[..., other].clamp(min=1e-300)
    return made.sum(-2)


def guarded(gram: Tensor, reference: int, counts: bool = True) -> Tensor:
    """The sum, less its part along a reference gradient where the two conflict: what the reference asks for is not undone.

    A-GEM (Chaudhry et al. 2019, arXiv:1812.00420, equation 11), where the reference only stands guard; where it counts in the sum,
    it is replay that decides what is learned and how (Hess et al. 2023, arXiv:2311.04898). gram: (..., K, K) -> (..., K)
    coefficients.
    """
    made = torch.ones_like(gram[..., 0])
    made[..., reference] = float(counts)
    conflict = (made * gram[..., reference]).sum(-1).clamp(max=0)
    made[..., reference] -= conflict / gram[..., reference, reference].clamp(min=1e-300)
    return made


class Rule:
    """How gradients become one.

    names: parts that it must know of.
    """

    names: tuple[str, ...] = ()

    def __call__(self, gram: Tensor, parts: Sequence[str], step: int) -> Tensor:
        """Inner products (M, K, K) of the gradients of K parts in each of M units -> coefficients (M, K) of their sum."""
        raise NotImplementedError(f"{type(self).__name__} must return coefficients")


class Projected(Rule):
    """Each is projected on the others that it conflicts with, in an order that is drawn for every step.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, gram: Tensor, parts: Sequence[str], step: int) -> Tensor:
        drawn = random.uniform(torch.tensor(random.seed_of(self.seed, step)), (len(parts), len(parts)), "order")
        return projected(gram, drawn.argsort(-1))


class Guarded(Rule):
    """The sum does not go against one part. In steps without that part nothing changes.

    Args:
        reference: its name, such as that of the objective on replayed data.
        counts: it is learned from as well; False = it only stands guard.
    """

    def __init__(self, reference: str, counts: bool = True) -> None:
        self.names, self.counts = (reference,), counts

    def __call__(self, gram: Tensor, parts: Sequence[str], step: int) -> Tensor:
        if self.names[0] not in parts:
            return torch.ones_like(gram[..., 0])
        return guarded(gram, list(parts).index(self.names[0]), self.counts)


class Harmonised(Handed):
    """Learns from the sum of the gradients of parts, after a rule has made them agree.

    The cosine of every pair of parts over the whole model, and the share of units in which a pair conflicts, are logged as
    train/cosine/A:B and train/conflicts. Heads of objectives, which belong to one part, get their plain gradient. All K gradients
    are held at once: K times the memory of the weights.

    Args:
        model: handed to the inner objective.
        inner: a `Weighted`, whose parts are made to agree, or an objective of several terms, such as Contrastive with pairs.
        rule: Projected or Guarded; None = Projected().
        unit: what is looked at by itself: the whole model, each block, or each parameter.
        groups: parts are groups of samples, such as sources, instead.
    """

    def __init__(
        self,
        model: Model,
        inner: Callable[[Model], Objective],
        rule: Rule | None = None,
        unit: Unit = "model",
        groups: Groups | None = None,
    ) -> None:
        super().__init__(model, inner)
        self.rule, self.unit, self.groups = rule or Projected(), unit, groups

    def gradient(self, probe: Probe, model: Model, batch: Batch) -> list[Tensor]:
        asks = divided(probe, self.inner, model, batch, self.groups)
        names = list(asks)
        if stray := set(self.rule.names) - {*names, *self.parts}:
            raise ValueError(f"the rule names {', '.join(sorted(stray))}; the parts of this loss are {', '.join(names)}")
        found = [gradient(probe, part) for part in asks.values()]
        own = sum(name.startswith("0.") for name in probe.names)  # of the model, which parts share
        number = units(probe.names[:own], self.unit)
        gram = products([g[:own] for g in found], number, probe.shared)
        self.tell(probe, names, gram)
        factors = self.rule(gram, names, batch.get("step", 0)).tolist()
        plain = [1.0] * len(names)
        return [
            sum((c * g for c, g in zip(factors[number[i]] if i < own else plain, each, strict=True)), torch.zeros_like(each[0]))
            for i, each in enumerate(zip(*found, strict=True))
        ]

    @staticmethod
    def tell(probe: Probe, names: Sequence[str], gram: Tensor) -> None:
        """Log how far parts agree."""
        whole, pairs = gram.sum(0), list(combinations(range(len(names)), 2))
        for a, b in pairs:
            cosine = whole[a, b] / (whole[a, a] * whole[b, b]).sqrt().clamp(min=1e-30)
            probe.tell(f"cosine/{names[a]}:{names[b]}", cosine)
        if pairs:
            probe.tell("conflicts", torch.stack([gram[:, a, b] < 0 for a, b in pairs]).float().mean())


def units(names: Sequence[str], unit: Unit) -> list[int]:
    """The number of the unit of every parameter. What is in no block is one unit with the rest of its module."""
    if unit == "model":
        return [0] * len(names)
    blocks = [re.match(r".*?\bblocks\.\d+", name) for name in names]
    keys = [name if unit == "parameter" else block[0] if block else name.rpartition(".")[0] for name, block in zip(names, blocks)]
    known = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [known[key] for key in keys]


def products(gradients: Sequence[Sequence[Tensor]], unit: Sequence[int], shared: bool) -> Tensor:
    """Inner products (M, K, K) float64 of K gradients in each of M units, the same on all ranks.

    unit: number of the unit of each parameter; shared: ranks hold shares of the gradients.
    """
    found: list[Tensor] = [torch.zeros(())] * (max(unit) + 1)
    for number, each in zip(unit, zip(*gradients, strict=True), strict=True):
        flat = torch.stack([distributed.local(g).flatten() for g in each]).double()
        found[number] = found[number].to(flat.device) + flat @ flat.T
    gram = torch.stack(found)
    return distributed.total(gram) if shared else gram
