"""The order of samples as a pure function: which sample is number i, with no state that could be lost.

Ranks and workers are mere readers of this order, so a run resumes exactly from its step, every rank makes the same number
of steps, and each sample comes once per epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from headwater.random import seed_of


class Places(NamedTuple):
    """Where samples lie: epoch, shard and row, each (K,) int64."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray


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
        self.before = np.concatenate([[0], np.cumsum(self.sizes)])
        self.total = int(self.before[-1])
        if not self.total:
            raise ValueError("the source holds no sample; check the shards with `headwater inspect`")

    def places(self, index: np.ndarray) -> Places:
        """Global indices (K,), any size -> where those samples lie."""
        epoch, place = np.divmod(np.asarray(index, np.int64), self.total)
        shard, row = np.empty_like(place), np.empty_like(place)
        for e in np.unique(epoch):
            ends, windows = self._epoch(int(e))
            mine = np.flatnonzero(epoch == e)
            number = np.searchsorted(ends, place[mine], side="right")
            for w in np.unique(number):
                rows = mine[number == w]
                inside = place[rows] - (ends[w - 1] if w else 0)
                shards, samples = self._rows(int(e), windows[w])
                shard[rows], row[rows] = shards[inside], samples[inside]
        return Places(epoch, shard, row)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """Global index -> (epoch, shard, row)."""
        epoch, shard, row = self.places(np.array([index]))
        return int(epoch[0]), int(shard[0]), int(row[0])

    def upcoming(self, index: int) -> list[int]:
        """The shards of the window of a global index and of the one after it, in the order of need."""
        epoch, place = divmod(index, self.total)
        ends, windows = self._epoch(epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        after = windows[number + 1] if number + 1 < len(windows) else self._epoch(epoch + 1)[1][0]
        return list(dict.fromkeys([*windows[number], *after]))

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


class Quality(NamedTuple):
    """How well an order mixes. displacement: how far a sample moves from its place in the files, as a share of the epoch (a
    full shuffle: 1/3). shards: different shards in a batch, as a share of what a full shuffle gives."""

    displacement: float
    shards: float


def quality(order: Order, batch: int, most: int = 100_000) -> Quality:
    """Measure the first `most` samples of epoch 0. batch: samples per step."""
    index = np.arange(min(order.total, most) // batch * batch or min(order.total, batch))
    _, shard, row = order.places(index)
    moved = np.abs(order.before[shard] + row - index).mean() / order.total
    met = np.mean([len(np.unique(part)) for part in np.array_split(shard, max(1, len(index) // batch))])
    size = min(batch, order.total)
    expected = (1 - (1 - order.sizes / order.total) ** size).sum()
    return Quality(float(moved), float(min(1.0, met / expected)))
