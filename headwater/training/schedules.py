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


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0
