"""Soft targets that come from the vectors and losses themselves: what else might be right?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headwater import distributed
from headwater.init import ZERO, Rule
from headwater.objectives.contrast.positives import Facts, Positives, Target, check_share, one_hot
from headwater.objectives.contrast.scores import Detached, Items, Score
from headwater.objectives.objective import Batch, Schedule, at


class Momentum(Positives):
    """(1 - share) of the target is the own partner, `share` is the softmax of the scores that the momentum encoders give.

    ALBEF (Li et al. 2021, arXiv:2107.07651, equation 6; https://github.com/salesforce/ALBEF). Without momentum encoders the
    objective gives the vectors of the step itself.

    Args:
        score: of the momentum encoders' items.
        share: a number or a schedule (ALBEF: 0 to 0.4 over the first epoch).
        temperature: of those scores.
    """

    def __init__(self, score: Score, share: float | Schedule = 0.4, temperature: float = 0.07) -> None:
        super().__init__(score)
        check_share(share)
        if temperature <= 0:
            raise ValueError(f"found temperature {temperature}; expected more than 0")
        self.compare, self.share, self.temperature = Detached(score), share, temperature
        self.like, self.progress = self.compare.like, 0.0

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        self.progress = batch.get("progress", 0.0)
        return items

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        taught = (self.compare(rows, columns) / self.temperature).to(scores.dtype)
        soft = taught.masked_fill(scores == -torch.inf, -torch.inf).softmax(1)
        return Target(torch.lerp(one_hot(own, scores), soft, at(self.share, self.progress)))


class Nearest(Positives):
    """`share` of the target goes evenly to the `k` candidates that are most like the own partner, itself apart.

    Nearest neighbours as positives (Dwibedi et al. 2021, NNCLR, arXiv:2104.14548, who take one from a queue and leave the
    partner out; several of them as Koohpayegani et al. 2021, arXiv:2105.07269).

    Args:
        score: compares candidates with the partner; with the momentum encoder's vectors where there is one.
        k: number of neighbours.
        share: a number or a schedule.
    """

    def __init__(self, score: Score, k: int = 1, share: float | Schedule = 0.5) -> None:
        super().__init__(score)
        check_share(share)
        if k < 1 or share == 1:
            raise ValueError(f"found k {k} and share {share}; expected 1 neighbour or more, and a share below 1")
        self.compare, self.k, self.share = Detached(score), k, share
        self.like, self.progress = self.compare.like, 0.0

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        self.progress = batch.get("progress", 0.0)
        return items

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        alone = one_hot(own, scores)
        alike = self.compare(tuple(c[own] for c in columns), columns)
        alike = alike.masked_fill((scores == -torch.inf) | alone.bool(), -torch.inf)
        value, place = alike.topk(min(self.k, alike.shape[1]), dim=1)
        found = (value > -torch.inf).to(scores.dtype)
        near = torch.zeros_like(scores).scatter_(1, place, found / found.sum(1, keepdim=True).clamp(min=1))
        share = at(self.share, self.progress) * found.amax(1, keepdim=True)  # with no other candidate the partner is all there is
        return Target((1 - share) * alone + share * near)


class NoiseAware(Positives):
    """Pairs that are probably mismatched have softer targets: T = (1 - p) * own partner + p * what else might be right.

    p is the probability that the row's own InfoNCE loss belongs to the higher of two normal components, which are fitted to the
    losses of all ranks (DivideMix, Li et al. 2020, arXiv:2002.07394; for pairs NCR, Huang et al. 2021, NeurIPS). The papers fit
    them once per epoch; here their moments follow every step, so nothing is kept per sample.

    Args:
        score: unused.
        toward: "scores" = the softmax of the row's scores, "uniform" = all candidates alike.
        momentum: of the moments, per step.
        warmup: steps during which p is 0; mismatched pairs stand out only after the matched ones have been learned.
        most: the largest p.
    """

    moments: Tensor
    steps: Tensor

    def __init__(
        self,
        score: Score,
        toward: Literal["scores", "uniform"] = "scores",
        momentum: float = 0.9,
        warmup: int = 50,
        most: float = 1.0,
    ) -> None:
        super().__init__(score)
        check_share(most)
        if not 0 <= momentum < 1 or warmup < 1:
            raise ValueError(f"found momentum {momentum} and warmup {warmup}; expected 0 <= momentum < 1 and at least 1 step")
        self.toward, self.momentum, self.warmup, self.most = toward, momentum, warmup, most
        self.register_buffer("moments", torch.zeros(2, 3, dtype=torch.float64))  # (component, sum of r, r x, r x^2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.losses: list[Tensor] = []

    def init_rules(self) -> dict[str, Rule]:
        return {"moments": ZERO, "steps": ZERO}

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        self.losses = []  # both sides are asked before any row
        return ()

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        loss = scores.logsumexp(1) - scores.gather(1, own[:, None])[:, 0]
        self.losses.append(loss.double())
        alone = one_hot(own, scores)
        if self.steps < self.warmup:
            return Target(alone)
        candidate = (scores > -torch.inf).to(scores.dtype)
        other = scores.softmax(1) if self.toward == "scores" else candidate / candidate.sum(1, keepdim=True)
        p = self.most * noisy(loss.double(), self.moments)[:, None].to(scores.dtype)
        return Target((1 - p) * alone + p * other)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        local = torch.cat(self.losses) if self.losses else self.moments.new_zeros(0)
        every, _ = distributed.gather(local)
        if len(every):
            parts = responsibility(every, self.moments) if self.steps else halves(every)
            new = torch.stack([(parts * power[:, None]).mean(0) for power in (torch.ones_like(every), every, every.square())], 1)
            self.moments.copy_(torch.lerp(new, self.moments, self.momentum) if self.steps else new)
            self.steps += 1
        self.losses = []


def halves(x: Tensor) -> Tensor:
    """Where the mixture starts: the lower and the upper half of the losses. (S,) -> (S, 2)."""
    upper = (x > x.median()).double()
    return torch.stack([1 - upper, upper], 1)


def responsibility(x: Tensor, moments: Tensor) -> Tensor:
    """Probability of both normal components for each loss, (S,) -> (S, 2). moments: (2, 3) sums of r, r x, r x^2 per loss."""
    weight = moments[:, 0].clamp(min=1e-6)
    mean = moments[:, 1] / weight
    variance = (moments[:, 2] / weight - mean.square()).clamp(min=1e-4)
    log = weight.log() - variance.log() / 2 - (x[:, None] - mean).square() / (2 * variance)
    return log.softmax(1)


def noisy(x: Tensor, moments: Tensor) -> Tensor:
    """(S,) probability of the component with the higher mean.

    Beyond both means the wider component would win; there a loss counts as the mean that is next to it.
    """
    mean = moments[:, 1] / moments[:, 0].clamp(min=1e-6)
    return responsibility(x.clamp(mean.min(), mean.max()), moments)[:, mean.argmax()]
