"""The order of samples as a pure function: which sample is number i, with no state that could be lost.

Ranks and workers are mere readers of this order, so a run resumes exactly from its step, every rank makes the same number
of steps, and each sample comes once per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from headwater.random import seed_of


class Order:
    """An endless shuffled order over shards of known sizes.

    Shards are permuted per epoch and cut into windows; samples are permuted within a window, so that a reader needs few
    shards open at a time.

    Args:
        sizes: number of samples in each shard.
        seed: of the run.
        window: shards per window; 0 = keep the order of the files (evaluation).
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int = 16) -> None:
        self.sizes, self.seed, self.window = np.asarray(sizes, np.int64), seed, window
        self.total = int(self.sizes.sum())
        if not self.total:
            raise ValueError("the source holds no sample; check the shards with `headwater inspect`")

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """Global index, any size -> (epoch, shard, row)."""
        epoch, place = divmod(index, self.total)
        ends, windows = self._epoch(epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        shards, rows = self._rows(epoch, windows[number])
        inside = place - (int(ends[number - 1]) if number else 0)
        return epoch, int(shards[inside]), int(rows[inside])

    @lru_cache(maxsize=2)  # noqa: B019  an order lives as long as its run
    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
        """Where each window ends, and its shards."""
        shards = np.arange(len(self.sizes))
        if self.window:
            shards = np.random.default_rng(seed_of(self.seed, epoch)).permutation(shards)
        width = self.window or len(shards)
        windows = [tuple(shards[i : i + width].tolist()) for i in range(0, len(shards), width)]
        return np.cumsum([self.sizes[list(w)].sum() for w in windows]), windows

    @lru_cache(maxsize=4)  # noqa: B019
    def _rows(self, epoch: int, window: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of every sample of a window, in order."""
        shards = np.repeat(window, self.sizes[list(window)])
        rows = np.concatenate([np.arange(self.sizes[s]) for s in window])
        if not self.window:
            return shards, rows
        shuffled = np.random.default_rng(seed_of(self.seed, epoch, window[0], 1)).permutation(len(rows))
        return shards[shuffled], rows[shuffled]


def turn(index: int, weights: Sequence[float]) -> tuple[int, int]:
    """Whose turn it is: number `index` of an endless mixture -> (source, how many turns that source had before).

    Source k's turn j falls at the time (j + 1/2) / weight_k and turns are taken in order of time, so every stretch of the
    mixture holds the sources in their shares, to within one turn each.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    low, high = 0.0, float(index + len(share) + 1)
    while True:  # find a time by which exactly `index` turns have passed, or where several sources are due at once
        time = (low + high) / 2
        taken = np.floor(time * share + 0.5).astype(np.int64)
        if taken.sum() == index or high - low < 1e-9 * (1 + high):
            break
        low, high = (time, high) if taken.sum() < index else (low, time)
    taken = np.floor(low * share + 0.5).astype(np.int64) if taken.sum() > index else taken
    for _ in range(index - int(taken.sum()) + 1):
        source = int(np.argmin(np.where(share > 0, (taken + 0.5) / np.where(share > 0, share, 1), np.inf)))
        taken[source] += 1
    return source, int(taken[source]) - 1
