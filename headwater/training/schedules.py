"""Schedules: pure functions of progress from 0 to 1, for learning rates, mask rates, temperatures, weights."""

from __future__ import annotations

import math


class Cosine:
    """Rises linearly from 0 to 1 over the share `warmup`, then falls to `end` along a half cosine.

    SGDR's annealing without restarts (Loshchilov and Hutter 2016, arXiv:1608.03983).
    """

    def __init__(self, warmup: float = 0.1, end: float = 0.0) -> None:
        self.warmup, self.end = warmup, end

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        if progress < self.warmup:
            return progress / self.warmup
        rest = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * rest)) / 2


class Linear:
    """From `start` to `end` along a line while progress is below `share`, then constant."""

    def __init__(self, start: float, end: float, share: float = 1.0) -> None:
        self.start, self.end, self.share = start, end, share

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.share)


class HalfCosine:
    """From `start` to `end` along half a cosine, as the momenta of teachers rise (BYOL, arXiv:2006.07733)."""

    def __init__(self, start: float, end: float = 1.0) -> None:
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Geometric:
    """From `start` to `end` by equal factors, as wav2vec 2.0's temperature falls (arXiv:2006.11477)."""

    def __init__(self, start: float, end: float) -> None:
        if min(start, end) <= 0:
            raise ValueError(f"found a geometric schedule from {start} to {end}; expected both above 0")
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.start * (self.end / self.start) ** min(1.0, progress)


class Step:
    """`start` while progress is below `when`, `end` from then on."""

    def __init__(self, start: float, end: float, when: float) -> None:
        self.start, self.end, self.when = start, end, when

    def __call__(self, progress: float) -> float:
        """progress: share of the run that is done."""
        return self.start if progress < self.when else self.end


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0
