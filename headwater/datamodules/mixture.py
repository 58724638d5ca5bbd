"""Whose turn it is: sources mixed by weights, as a pure function of the step and of a ledger of weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

Mode = Literal["weights", "epoch", "size"]
CHANGES = 4096  # that a ledger can hold


class Ledger:
    """The weights of a run and when they changed, in memory that loader workers share.

    A change is written before the step at which it begins is planned by any worker, so all see the same order.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._rows = torch.zeros(CHANGES, 1 + len(weights), dtype=torch.float64).share_memory_()
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()
        self.add(0, weights)

    def __len__(self) -> int:
        return int(self._count)

    @property
    def sources(self) -> int:
        """How many weights an entry has."""
        return self._rows.shape[1] - 1

    def add(self, step: int, weights: Sequence[float]) -> None:
        """From `step` on these weights hold; steps only grow."""
        given = torch.tensor([step, *weights], dtype=torch.float64)
        if len(given) != self._rows.shape[1] or not (given[1:] >= 0).all() or not 0 < float(given[1:].sum()) < float("inf"):
            raise ValueError(f"found the weights {list(weights)}; expected {self._rows.shape[1] - 1} numbers >= 0, not all 0")
        last = len(self)
        if last == CHANGES:
            raise ValueError(f"the weights changed {CHANGES} times, more than the ledger holds; change them less often")
        if last and step < float(self._rows[last - 1, 0]):
            raise ValueError(f"weights were already planned to change at step {int(self._rows[last - 1, 0])}, after step {step}")
        place = last - 1 if last and step == int(self._rows[last - 1, 0]) else last
        self._rows[place] = given
        self._count.fill_(place + 1)  # last, so that a reader never sees half a row

    @property
    def entries(self) -> list[tuple[int, tuple[float, ...]]]:
        """(first step, weights), in order of steps."""
        return [(int(step), tuple(weights)) for step, *weights in self._rows[: len(self)].tolist()]

    def restore(self, entries: Sequence[tuple[int, Sequence[float]]]) -> None:
        """Take over the entries of a checkpoint."""
        self._count.zero_()
        for step, weights in entries:
            self.add(step, weights)


class Turns(NamedTuple):
    """A stretch of a mixture. source: (K,) whose turn; before: (K,) how many turns that source had before."""

    source: np.ndarray
    before: np.ndarray


class Mixture:
    """Sources taking turns in their shares, to within one turn of each at every moment since the last change.

    Args:
        ledger: the weights.
        turns: per step.
    """

    def __init__(self, ledger: Ledger, turns: int) -> None:
        self.ledger, self.turns = ledger, turns

    def step(self, step: int) -> Turns:
        """The turns of one step."""
        start, weights = [entry for entry in self.ledger.entries if entry[0] <= step][-1]
        source, count = turns((step - start) * self.turns, self.turns, weights)
        return Turns(source, count + self.counts(start)[source])

    def counts(self, step: int) -> np.ndarray:
        """(sources,) turns that each had before `step`."""
        total = np.zeros(self.ledger.sources, np.int64)
        entries = [*(entry for entry in self.ledger.entries if entry[0] < step), (step, ())]
        for (start, weights), (end, _) in pairwise(entries):
            total = total + taken((end - start) * self.turns, weights)
        return total


def shares(mode: Mode, weights: Sequence[float], sizes: Sequence[int], alpha: float) -> list[float]:
    """The weights that a mode means.

    "weights": fixed proportions. "epoch": every sample of every source once before any comes again, so weights are the sizes.
    "size": weight * size^alpha (alpha < 1 lifts small sources; Devlin et al. 2018 for languages).
    """
    if mode == "weights":
        return [float(w) for w in weights]
    if mode == "epoch" and any(w != 1 for w in weights):
        raise ValueError(f"mixing 'epoch' takes every sample once; found weights {list(weights)}. Take them out, or mix by weights")
    power = 1.0 if mode == "epoch" else alpha
    return [w * float(n) ** power for w, n in zip(weights, sizes, strict=True)]


@lru_cache(maxsize=1024)
def taken(count: int, weights: tuple[float, ...]) -> Any:
    """How many of the first `count` turns each source has, (sources,) int64.

    Source k's turn j falls at the time (j + 1/2) / weight_k, and turns are taken in order of time.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    low, high = 0.0, float(count + len(share) + 1)
    while True:  # find a time by which exactly `count` turns have passed, or where several sources are due at once
        time = (low + high) / 2
        passed = np.floor(time * share + 0.5).astype(np.int64)
        if passed.sum() == count or high - low < 1e-9 * (1 + high):
            break
        low, high = (time, high) if passed.sum() < count else (low, time)
    passed = np.floor(low * share + 0.5).astype(np.int64) if passed.sum() > count else passed
    return passed + np.bincount(_merge(passed, count - int(passed.sum()), share).source, minlength=len(share))


def turns(first: int, count: int, weights: tuple[float, ...]) -> Turns:
    """Turns first ... first + count - 1 of an endless mixture."""
    return _merge(taken(first, weights), count, np.asarray(weights, np.float64) / np.sum(weights))


def _merge(passed: np.ndarray, count: int, share: np.ndarray) -> Turns:
    """The next `count` turns when each source has had `passed`; of turns at the same time the first source's goes first."""
    number = passed[:, None] + np.arange(count)
    with np.errstate(divide="ignore"):
        time = (number + 0.5) / share[:, None]
    source = np.repeat(np.arange(len(share)), count)
    chosen = np.argsort(time.ravel(), kind="stable")[:count]
    return Turns(source[chosen], number.ravel()[chosen])
