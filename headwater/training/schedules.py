"""Schedules: pure functions of progress from 0 to 1, for learning rates, weight decay, momenta, mask rates, temperatures, weights.

Resuming needs nothing of them: where a run stands is its step. Lengths are shares of the run, or of the stage (`stages:` of a
recipe); where `trainer.max_time` is set, progress is the share of the time that is gone if that is further, so that whatever ends
at progress 1 ends at the deadline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from headwater.objectives.objective import Curve

Shape = Literal["linear", "cosine", "sqrt", "square", "exponential"]


def rise(progress: float, warmup: float, start: float = 0.0) -> float:
    """From `start` to 1 along a line over the share `warmup`."""
    return start + (1 - start) * progress / warmup if progress < warmup else 1.0


def fall(x: float, end: float, shape: Shape) -> float:
    """From 1 to `end` as x goes from 0 to 1; all shapes but the exponential are mixed with `end`, so that they can reach 0.

    "sqrt" is 1 - sqrt(x), which anneals best in Hagele et al. 2024 (arXiv:2405.18392, section 3); "exponential" falls by equal
    factors (MiniCPM, arXiv:2404.06395, section 4).
    """
    if shape == "exponential":
        return end**x
    of = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "sqrt": 1 - math.sqrt(x), "square": 1 - x * x}[shape]
    return end + (1 - end) * of


class Cosine(Curve):
    """Rises linearly from `start` to 1 over the share `warmup`, then falls to `end` along a half cosine.

    SGDR's annealing without restarts (Loshchilov and Hutter 2016, arXiv:1608.03983).
    """

    def __init__(self, warmup: float = 0.1, end: float = 0.0, start: float = 0.0) -> None:
        check_shares(warmup=warmup)
        self.warmup, self.end, self.start = warmup, end, start

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        if progress < self.warmup:
            return rise(progress, self.warmup, self.start)
        return fall(min(1.0, (progress - self.warmup) / max(1 - self.warmup, 1e-12)), self.end, "cosine")


class Rewarm(Cosine):
    """Continues from a checkpoint: back up from `start`, the share of the peak where the earlier run ended, then a half cosine.

    Re-warming and re-decaying (Gupta et al. 2023, arXiv:2308.04014; Ibrahim et al. 2024, arXiv:2403.08763).
    """

    def __init__(self, start: float = 0.1, warmup: float = 0.01, end: float = 0.1) -> None:
        super().__init__(warmup, end, start)


class WSD(Curve):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): constant between a linear rise and a fall of chosen shape.

    Only the decay depends on when the run ends, so a checkpoint of the constant part goes on as long as one likes, and each decay
    that branches off gives a finished model. `decay` 1 - warmup with "linear" is the fall to 0 at the end of a budget of steps
    or time (Li et al. 2020, arXiv:1905.04753).

    Args:
        warmup: share of the run that rises.
        decay: share of the run, at its end, that falls; 0 = none.
        end: factor where the fall ends.
        shape: of the fall; see `fall`.
        start: factor where the rise begins.
    """

    def __init__(
        self, warmup: float = 0.05, decay: float = 0.2, end: float = 0.0, shape: Shape = "linear", start: float = 0.0
    ) -> None:
        check_shares(warmup=warmup, decay=decay)
        if shape == "exponential" and end <= 0:
            raise ValueError(f"found an exponential decay to {end}, which it never reaches; expected an end above 0, such as 0.1")
        self.warmup, self.decay, self.end, self.shape, self.start = warmup, decay, end, shape, start

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        if progress < self.warmup or not self.decay:
            return rise(progress, self.warmup, self.start)
        return fall(min(1.0, max(0.0, progress - (1 - self.decay)) / self.decay), self.end, self.shape)


class Infinite(Curve):
    """Warm-up, cool-down to a constant, the constant for as long as one likes, and a short annealing (arXiv:2403.08763, section 7).

    A run without end has `anneal` 0; whoever wants a finished model anneals from one of its checkpoints, and the next data goes on
    from the constant part without re-warming.

    Args:
        warmup: share of the run that rises from 0 to 1.
        cooldown: share of the run, after it, that falls to `level`.
        level: the constant, as a share of the peak.
        anneal: share of the run, at its end, that falls by equal factors.
        end: where that ends, as a share of the peak.
        shape: of the cool-down: half a cosine, or 1 / sqrt(1 + 10 x), stretched so that it ends at `level`.
    """

    def __init__(
        self,
        warmup: float = 0.01,
        cooldown: float = 0.3,
        level: float = 0.5,
        anneal: float = 0.15,
        end: float = 0.05,
        shape: Literal["cosine", "inverse sqrt"] = "cosine",
    ) -> None:
        check_shares(warmup=warmup, cooldown=cooldown, anneal=anneal)
        if not 0 < end <= level <= 1:
            raise ValueError(f"found level {level} and end {end}; expected 0 < end <= level <= 1, shares of the peak")
        self.warmup, self.cooldown, self.level, self.anneal, self.end = warmup, cooldown, level, anneal, end
        self.shape = shape

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        if progress < self.warmup:
            return rise(progress, self.warmup)
        if progress < self.warmup + self.cooldown:
            x = (progress - self.warmup) / self.cooldown
            return fall(x, self.level, "cosine") if self.shape == "cosine" else self._inverse_sqrt(x)
        if progress <= 1 - self.anneal or not self.anneal:
            return self.level
        return self.level * fall(min(1.0, (progress - (1 - self.anneal)) / self.anneal), self.end / self.level, "exponential")

    def _inverse_sqrt(self, x: float) -> float:
        def h(y: float) -> float:
            return 1 / math.sqrt(1 + 10 * y) - 1

        return 1 + (self.level - 1) * h(x) / h(1)


class InverseSqrt(Curve):
    """Rises linearly, then falls as 1 / sqrt(step) (Vaswani et al. 2017, arXiv:1706.03762), 1 where the rise ends.

    Args:
        warmup: share of the run that rises.
        decay: share of the run, at its end, over which a line to 0 is multiplied in (arXiv:2106.04560, section 3.5); 0 = none.
    """

    def __init__(self, warmup: float = 0.1, decay: float = 0.0) -> None:
        check_shares(warmup=warmup, decay=decay)
        if not warmup:
            raise ValueError("found no warm-up, where 1 / sqrt(step) has no size; expected a share above 0, such as 0.1")
        self.warmup, self.decay = warmup, decay

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        if progress < self.warmup:
            return rise(progress, self.warmup)
        down = min(1.0, (1 - progress) / self.decay) if self.decay else 1.0
        return math.sqrt(self.warmup / progress) * down


class Linear(Curve):
    """From `start` to `end` along a line while progress is below `share`, then constant."""

    def __init__(self, start: float, end: float, share: float = 1.0) -> None:
        self.start, self.end, self.share = start, end, share

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.share)


class HalfCosine(Curve):
    """From `start` to `end` along half a cosine, as the momenta of teachers rise (BYOL, arXiv:2006.07733)."""

    def __init__(self, start: float, end: float = 1.0) -> None:
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Geometric(Curve):
    """From `start` to `end` by equal factors, as wav2vec 2.0's temperature falls (arXiv:2006.11477)."""

    def __init__(self, start: float, end: float) -> None:
        if min(start, end) <= 0:
            raise ValueError(f"found a geometric schedule from {start} to {end}; expected both above 0")
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.start * (self.end / self.start) ** min(1.0, progress)


class Step(Curve):
    """`start` while progress is below `when`, `end` from then on."""

    def __init__(self, start: float, end: float, when: float) -> None:
        self.start, self.end, self.when = start, end, when

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.start if progress < self.when else self.end


class Points(Curve):
    """Lines between points (progress, value), constant before the first and after the last: any shape at all.

    Args:
        points: by rising progress; two of one progress make a jump.
    """

    def __init__(self, points: list[tuple[float, float]]) -> None:
        at = [x for x, _ in points]
        if not points or at != sorted(at) or not 0 <= at[0] <= at[-1] <= 1:
            raise ValueError(f"found points {points}; expected [progress, value] pairs with progress rising within 0 to 1")
        self.points = [(float(x), float(y)) for x, y in points]

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        if progress < self.points[0][0]:
            return self.points[0][1]
        for (a, y), (b, z) in pairwise(self.points):
            if a <= progress < b:
                return y + (z - y) * (progress - a) / (b - a)
        return self.points[-1][1]


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def areas(rates: Sequence[float], memory: float = 0.999) -> tuple[float, float]:
    """S1, the sum of the rates of all steps, and S2, the annealing area, from which loss curves are fitted (arXiv:2408.11029).

    S2 = sum over steps i and k <= i of (rate[k - 1] - rate[k]) * memory^(i - k): how much the rate has fallen, weighed by how long
    ago. rates: from the peak on, one of each step; a warm-up would count as negative annealing.
    """
    momentum = area = 0.0
    for before, now in pairwise(rates):
        momentum = memory * momentum + before - now
        area += momentum
    return math.fsum(rates), area


def check_shares(**shares: float) -> None:
    """ValueError where shares of a run are no shares, or together more than all of it."""
    if min(shares.values()) < 0 or sum(shares.values()) > 1 + 1e-9:
        raise ValueError(
            f"found {', '.join(f'{name} {share}' for name, share in shares.items())}; expected shares of the run, at least 0 and "
            "together at most 1"
        )
