"""How an answer is scored against a label: one class per kind of label, each around a small formula.

Formulas take answers (K, C) and labels of K targets and return K losses; a label that is NaN, or holds no vote, costs nothing
and has no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import fused
from headwater.init import ZERO, Rule
from headwater.model import Reader


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """(K, C), (K,) ids -> (K,): the target is 1 - smoothing on its class plus smoothing spread over all C (arXiv:1512.00567)."""
    return fused.cross_entropy(logits, target, smoothing)


def binary(logits: Tensor, target: Tensor) -> Tensor:
    """(K, C), (K, C) of 0 to 1 -> (K,): mean over the known classes of the binary cross entropy."""
    return known_mean(F.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none"), target)


def huber(answer: Tensor, target: Tensor, delta: float | None = None) -> Tensor:
    """(K, C), (K, C) -> (K,): mean over the known numbers of e^2 / 2, beyond |e| = delta of delta (|e| - delta / 2)."""
    error = answer - torch.where(target.isnan(), answer.detach(), target)
    cost = error.square() / 2
    return known_mean(cost if delta is None else torch.where(error.abs() <= delta, cost, delta * (error.abs() - delta / 2)), target)


def ordinal(score: Tensor, target: Tensor, cuts: Tensor) -> Tensor:
    """(K,), (K,) ids, (C - 1,) rising -> (K,): -log P(y) where P(y <= k) = sigmoid(cuts[k] - score).

    The proportional odds model (McCullagh 1980). sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose
    logarithm does not cancel.
    """
    ends = cuts.new_full((1,), math.inf)
    upper, lower = torch.cat([cuts, ends])[target] - score, torch.cat([-ends, cuts])[target] - score
    return -(F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper)))


def dirichlet_multinomial(alpha: Tensor, votes: Tensor) -> Tensor:
    """(K, C) above 0, (K, C) counts -> (K,): -log of their probability, without the number of orders, which no answer changes.

    With A the sum of alpha and n that of the votes: -(lgamma(A) - lgamma(A + n) + sum(lgamma(alpha + votes) - lgamma(alpha))), as
    for votes on galaxies (Walmsley et al. 2021, arXiv:2102.08414, section 3).
    """
    votes, whole = votes.nan_to_num(), alpha.sum(-1)
    each = torch.lgamma(alpha + votes) - torch.lgamma(alpha)
    return torch.lgamma(whole + votes.sum(-1)) - torch.lgamma(whole) - each.sum(-1)


def known_mean(cost: Tensor, target: Tensor) -> Tensor:
    """(K, C) -> (K,) mean over the entries whose target is a number."""
    known = ~target.isnan()
    return torch.where(known, cost, 0).sum(-1) / known.sum(-1).clamp(min=1)


class LabelLoss(nn.Module):
    """size: how many numbers the head answers. classes: among how many each target chooses, where it does.

    Args:
        label: reader of the labels.
    """

    ids: bool = False  # it wants numbers of classes, else vectors
    classes: int | None = None

    def __init__(self, label: Reader) -> None:
        super().__init__()
        if self.ids != (label.vocab is not None):
            found, fits = ("ids", "Numbers or Categories") if label.vocab else ("vectors", "Category")
            raise ValueError(f"{type(self).__name__} got labels of {type(label).__name__}, which are {found}; take {fits}")
        self.size = label.vocab or label.features

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        """(K, size), (K,) ids or (K, size) numbers -> (K,)."""
        raise NotImplementedError(f"{type(self).__name__}.forward must return one loss per target")

    def metrics(self, answer: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What to log of K > 0 targets."""
        return {}


class CrossEntropy(LabelLoss):
    """One of several classes.

    Args:
        label: gives ids.
        smoothing: share of the target that is spread over all classes.
    """

    ids = True

    def __init__(self, label: Reader, smoothing: float = 0.0) -> None:
        super().__init__(label)
        self.classes, self.smoothing = label.vocab, smoothing

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        return smoothed_cross_entropy(answer, target, self.smoothing)

    def metrics(self, answer: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (answer.argmax(-1) == target).float().mean()}


class Binary(LabelLoss):
    """Every class is there or not: tags. The metric is how often the class with the highest score is there."""

    classes = 2

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        return binary(answer, target)

    def metrics(self, answer: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"first": (target.gather(-1, answer.argmax(-1, keepdim=True)) > 0.5).float().mean()}


class Regression(LabelLoss):
    """Numbers.

    Args:
        label: gives vectors.
        delta: errors beyond it count linearly (Huber 1964); None = all squares.
    """

    def __init__(self, label: Reader, delta: float | None = None) -> None:
        super().__init__(label)
        if delta is not None and delta <= 0:
            raise ValueError(f"found delta {delta}; expected an error above 0 from which on it counts linearly, or none")
        self.delta = delta

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        return huber(answer, target, self.delta)

    def metrics(self, answer: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"off_by": (answer - target).abs().nanmean()}


class Ordinal(LabelLoss):
    """Classes in an order: one score, cut at learned places that start where a score of 0 makes all classes equally likely."""

    ids = True
    gaps: Tensor

    def __init__(self, label: Reader) -> None:
        super().__init__(label)
        self.classes = int(label.vocab or 0)
        if self.classes < 2:
            raise ValueError(f"found {self.classes} classes in an order; expected 2 or more")
        self.register_buffer("gaps", self.even(), persistent=False)
        self.shift = nn.Parameter(torch.zeros(self.classes - 1))  # of the first cut, and of the logarithm of each gap
        self.size = 1

    def init_rules(self) -> dict[str, Rule]:
        return {"shift": ZERO, "gaps": Rule("fixed", self.even)}

    def even(self) -> Tensor:
        """(C - 1,) the first cut and the distances of the others, so that all classes are equally likely."""
        count = int(self.classes or 0)
        cuts = torch.logit(torch.arange(1, count) / count)
        return torch.cat([cuts[:1], cuts.diff()])

    def cuts(self) -> Tensor:
        """(C - 1,) rising."""
        return torch.cat([self.gaps[:1] + self.shift[:1], self.gaps[1:] * self.shift[1:].exp()]).cumsum(0)

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        return ordinal(answer[:, 0], target, self.cuts().to(answer.dtype))

    def metrics(self, answer: Tensor, target: Tensor) -> dict[str, Tensor]:
        guess = (answer > self.cuts()).sum(-1)
        return {"accuracy": (guess == target).float().mean(), "off_by": (guess - target).abs().float().mean()}


class Votes(LabelLoss):
    """How many people chose each class: the head answers with a Dirichlet distribution over their opinions.

    Its parameters are the softplus of the head's numbers, so that it also tells how sure it is. The metric is how far the
    expected shares of votes are off, on average over classes.
    """

    def alpha(self, answer: Tensor) -> Tensor:
        """(K, C) above 0."""
        return F.softplus(answer) + 1e-4

    def forward(self, answer: Tensor, target: Tensor) -> Tensor:
        return dirichlet_multinomial(self.alpha(answer), target)

    def metrics(self, answer: Tensor, target: Tensor) -> dict[str, Tensor]:
        alpha, share = self.alpha(answer), target / target.sum(-1, keepdim=True)
        return {"off_by": (alpha / alpha.sum(-1, keepdim=True) - share).abs().nanmean()}
