"""Figures with their intervals and what chance or a trivial answer would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater import distributed


class Result(NamedTuple):
    """One figure of an evaluation.

    low, high: 95 % interval. against: name of a trivial answer -> what it reaches. n: queries or steps.
    """

    source: str
    metric: str
    value: float
    low: float
    high: float
    against: dict[str, float]
    n: int


def interval(scores: np.ndarray, group: Sequence[int] | np.ndarray | None = None, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of scores (n,). group: whole groups are drawn (steps of an episode)."""
    scores = np.asarray(scores, np.float64)
    _, inverse = np.unique(np.arange(len(scores)) if group is None else np.asarray(group), return_inverse=True)
    return ratio_interval(np.bincount(inverse, scores), np.bincount(inverse), draws)


def ratio_interval(total: np.ndarray, number: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The same of a sum over a sum, such as bits over bytes, of entries (n,) that are drawn as a whole."""
    drawn = np.random.default_rng(0).integers(0, len(total), (draws, len(total)))
    means = total[drawn].sum(1) / number[drawn].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def by_sample(sample: Tensor, *values: Tensor) -> list[Tensor]:
    """Rows of all ranks sorted by sample id, each id once. sample: (S,); values: (S, ...). Returns [sample, *values]."""
    real = sample >= 0  # a rank without samples holds a row that stands in
    every = [distributed.gather(v[real])[0] for v in (sample, *values)]
    ids, inverse = every[0].unique(return_inverse=True)
    first = torch.full((len(ids),), len(inverse), device=ids.device).scatter_reduce(
        0, inverse, torch.arange(len(inverse), device=ids.device), "amin"
    )
    return [v[first].cpu() for v in every]
