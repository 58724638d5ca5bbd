"""How much each wrong candidate counts: hard ones more, suspected answers not at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from headwater.objectives.contrast.positives import Facts, Identity, Positives, Target
from headwater.objectives.contrast.scores import Detached, Items, Score
from headwater.objectives.objective import Batch


def hardness(scores: Tensor, answer: Tensor, beta: float) -> Tensor:
    """Log weights (A, C) of the wrong candidates, exp(beta S) over its mean among them; 0 for answers.

    scores: (A, C), -inf = no candidate; answer: (A, C) True = right.
    """
    wrong = (beta * scores).masked_fill(answer | (scores == -torch.inf), -torch.inf)
    number = (wrong > -torch.inf).sum(1, keepdim=True).clamp(min=1)
    weight = wrong - wrong.logsumexp(1, keepdim=True) + number.to(scores.dtype).log()
    return torch.where(wrong > -torch.inf, weight, 0.0)


class Inner(Positives):
    """Around other positives, whose facts and state it hands on.

    Args:
        score: handed on.
        inner: which candidates are answers.
    """

    def __init__(self, score: Score, inner: Callable[[Score], Positives] = Identity) -> None:
        super().__init__(score)
        self.inner = inner(score)
        self.needs, self.readers, self.like = self.inner.needs, dict(self.inner.readers), self.inner.like

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        return self.inner.facts(batch, name, sample, items)

    def after_step(self, progress: float) -> None:
        self.inner.after_step(progress)


class HardNegatives(Inner):
    """Wrong candidates count by exp(beta S), normalised to the mean 1; answers count alpha times among the candidates.

    Importance weights of Robinson et al. 2020 (HCL, arXiv:2010.04592; https://github.com/joshr17/HCL), with the discount alpha
    of Radenovic et al. 2023 (HN-NCE, arXiv:2301.02280). Weights are constants in the gradient. With beta 0 and alpha 1 nothing
    changes; alpha 0 takes the answer out of the denominator (Yeh et al. 2021, arXiv:2110.06848).

    Args:
        score: handed on.
        beta: 0 or more; on scores with the temperature in.
        alpha: 0 to 1.
        inner: which candidates are answers.
    """

    def __init__(
        self, score: Score, beta: float = 0.25, alpha: float = 1.0, inner: Callable[[Score], Positives] = Identity
    ) -> None:
        super().__init__(score, inner)
        if beta < 0 or not 0 <= alpha <= 1:
            raise ValueError(f"found beta {beta} and alpha {alpha}; expected beta of 0 or more and alpha from 0 to 1")
        self.beta, self.log_alpha = beta, math.log(alpha) if alpha else -math.inf

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        target = self.inner(rows, columns, own, scores)
        answer, log_w = target.t > 0, target.log_w
        if log_w is not None:  # what is left out has no share in the mean
            scores = scores.masked_fill(log_w == -torch.inf, -torch.inf)
        weight = hardness(scores, answer, self.beta).masked_fill(answer, self.log_alpha)
        return target._replace(log_w=weight if log_w is None else weight + log_w)


class WithoutFalse(Inner):
    """Leaves out wrong candidates that look like the row's own answer: they may be right (false negatives).

    Chen et al. 2021, arXiv:2106.03719 (elimination). Candidates are compared with the answer, which is of their kind, by the
    score itself, without temperature; with the momentum encoder's vectors where there is one.

    Args:
        score: compares; its items must be of one size.
        above: the smallest score of a suspect; for cosines below 1.
        inner: which candidates are answers.
    """

    def __init__(self, score: Score, above: float = 0.9, inner: Callable[[Score], Positives] = Identity) -> None:
        super().__init__(score, inner)
        self.compare, self.above = Detached(score), above
        self.like = (*self.compare.like, *self.inner.like)

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        return (*items, *super().facts(batch, name, sample, items))

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        size = len(self.compare.like)
        target = self.inner(rows[size:], columns[size:], own, scores)
        suspect = self.compare(tuple(c[own] for c in columns[:size]), columns[:size]) >= self.above
        out = torch.zeros_like(scores).masked_fill(suspect & (target.t == 0), -torch.inf)
        return target._replace(log_w=out if target.log_w is None else target.log_w + out)
