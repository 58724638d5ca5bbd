"""What a step consists of, worked out before anything is read: which samples, in which rows, on which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from headwater import random
from headwater.datamodules.mixture import Ledger, Mixture

Unit = Literal["batch", "sample"]
Last = Literal["wrap", "drop", "short"]


@dataclass
class Arrange:
    """Samples that go well together are put into the same batch.

    Within every `steps` steps the samples are sorted, cut into batches, and the batches shuffled: every sample still comes
    once per epoch, and the plan of a window depends on its number alone.

    Args:
        by: "length" (tokens of all modalities together), a modality (its tokens), or a hint of the index ("txt.cluster").
        steps: per window.
        join: samples of a batch with the same hint become one document, in which later ones see earlier ones
            (in-context pretraining: Shi et al. 2023, arXiv:2310.10638).
    """

    by: str = "length"
    steps: int = 16
    join: bool = False


class Step(NamedTuple):
    """The global batch of a step. source: (B,); place: (B,) in the order of that source; rows: documents per row, each the
    places of its samples in the batch; None = every sample is a row of its own."""

    source: np.ndarray
    place: np.ndarray
    rows: list[list[list[int]]] | None

    def of_rank(self, rank: int, world: int) -> Step:
        """Every world-th row."""
        if self.rows is None:
            return Step(self.source[rank::world], self.place[rank::world], None)
        mine = self.rows[rank::world]
        chosen = [s for row in mine for document in row for s in document]
        number = {s: k for k, s in enumerate(chosen)}
        rows = [[[number[s] for s in document] for document in row] for row in mine]
        return Step(self.source[chosen], self.place[chosen], rows)


class Plan:
    """The batches of a run as a pure function of the step and the ledger.

    Args:
        sources: opened sources.
        ledger: their weights.
        batch_size: samples per step over all ranks.
        unit: "batch" = each step comes from one source, in turn; "sample" = each step mixes all.
        last: what happens to the last samples of an epoch that do not fill a batch. "wrap": the next epoch fills it up;
            "drop": they are left out in this epoch; "short": the batch is smaller.
        seed: of the run.
        arrange, pack: see the data module.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        ledger: Ledger,
        batch_size: int,
        unit: Unit = "batch",
        last: Last = "wrap",
        seed: int = 0,
        arrange: Arrange | None = None,
        pack: dict[str, int] | None = None,
    ) -> None:
        if last != "wrap" and unit == "sample" and len(sources) > 1:
            raise ValueError(f"last={last!r} needs steps of one source; found unit='sample'. Take unit='batch' or last='wrap'")
        if arrange:
            known = {"length", *(name for source in sources for name in (*source.readers, *source.hints))}
            if arrange.by not in known:
                raise ValueError(f"found arrange.by={arrange.by!r}; expected one of {', '.join(sorted(known))}")
        self.sources, self.batch_size, self.unit, self.last = list(sources), batch_size, unit, last
        self.seed, self.arrange, self.pack, self.ledger = seed, arrange, pack, ledger
        self.mixture = Mixture(ledger, batch_size if unit == "sample" else 1)

    def size(self, source: int) -> int:
        """Samples per step of a source."""
        return (self.unit == "batch" and self.sources[source].source.batch_size) or self.batch_size

    def steps(self, source: int) -> int:
        """Steps that make up one epoch of a source."""
        size, total = self.size(source), self.sources[source].total
        return max(1, total // size) if self.last == "drop" else -(-total // size)

    def step(self, step: int) -> Step:
        """The global batch."""
        if self.unit == "batch":
            turn = self.mixture.step(step)
            source, before = int(turn.source[0]), int(turn.before[0])
            index = self._turn(source, before)
            sources = np.full(len(index), source)
        else:
            sources, index = self._mixed(step)
        return Step(sources, index, self._rows(sources, index))

    def shares(self, step: int) -> dict[str, float]:
        """Source -> its share of the samples before `step`."""
        turns = self.mixture.counts(step).astype(np.float64)
        samples = turns * [self.size(k) if self.unit == "batch" else 1 for k in range(len(self.sources))]
        return {s.name: float(n / max(samples.sum(), 1)) for s, n in zip(self.sources, samples, strict=True)}

    def _turn(self, source: int, turn: int) -> np.ndarray:
        """The samples of a source's turn number `turn`."""
        if self.arrange is None:
            return self._plain(source, turn)
        window, place = divmod(turn, self.arrange.steps)
        return self._window(source, window)[place]

    def _plain(self, source: int, turn: int) -> np.ndarray:
        size, total = self.size(source), self.sources[source].total
        if self.last == "wrap":
            return turn * size + np.arange(size)
        epoch, place = divmod(turn, self.steps(source))
        return epoch * total + np.arange(place * size, min(place * size + size, total))

    @lru_cache(maxsize=8)  # noqa: B019  a plan lives as long as its run
    def _window(self, source: int, window: int) -> list[np.ndarray]:
        """Turns of one source, arranged."""
        assert self.arrange
        turns = [self._plain(source, window * self.arrange.steps + k) for k in range(self.arrange.steps)]
        index = np.concatenate(turns)
        parts = self._arranged(np.full(len(index), source), index, [len(t) for t in turns], (source, window))
        return [index[part] for part in parts]

    def _mixed(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and indices of a step that mixes them."""
        if self.arrange is None:
            return tuple(self.mixture.step(step))  # type: ignore[return-value]
        window, place = divmod(step, self.arrange.steps)
        return self._mixed_window(window, len(self.ledger))[place]

    @lru_cache(maxsize=8)  # noqa: B019
    def _mixed_window(self, window: int, changes: int) -> list[tuple[np.ndarray, np.ndarray]]:
        assert self.arrange
        turns = [self.mixture.step(window * self.arrange.steps + k) for k in range(self.arrange.steps)]
        source, index = (np.concatenate(column) for column in zip(*turns))
        parts = self._arranged(source, index, [self.batch_size] * len(turns), (window,))
        return [(source[part], index[part]) for part in parts]

    def _arranged(self, source: np.ndarray, index: np.ndarray, sizes: Sequence[int], name: tuple[int, ...]) -> list[np.ndarray]:
        """Places of a window's samples, sorted, cut into batches of these sizes, the batches shuffled."""
        assert self.arrange
        sort = np.argsort(self._keys(source, index, self.arrange.by), kind="stable")
        parts = np.split(sort, np.cumsum(sizes)[:-1])
        shuffle = np.random.default_rng(random.seed_of(self.seed, *name)).permutation(len(parts))
        return [parts[k] for k in shuffle] if len(set(sizes)) == 1 else parts  # a turn must keep its number of samples

    def _keys(self, source: np.ndarray, index: np.ndarray, by: str) -> np.ndarray:
        """What samples are sorted by; unknown hints last."""
        keys = np.full(len(index), np.inf)
        for k in np.unique(source):
            mine = np.flatnonzero(source == k)
            opened = self.sources[k]
            if by == "length" or by in opened.readers:
                lengths = opened.lengths(index[mine])
                keys[mine] = sum(lengths.values()) if by == "length" else lengths[by]
            else:
                found = opened.hint(by, index[mine])
                keys[mine] = np.where(np.isnan(found), np.inf, found)
        return keys

    def _rows(self, source: np.ndarray, index: np.ndarray) -> list[list[list[int]]] | None:
        """Documents in rows, or None when nothing is packed or joined."""
        joined = self.arrange is not None and self.arrange.join
        if not self.pack and not joined:
            return None
        documents = [[k] for k in range(len(index))]
        if joined and self.arrange:
            keys = self._keys(source, index, self.arrange.by)
            groups: dict[tuple[float, int], list[int]] = {}
            for k, key in enumerate(keys.tolist()):
                groups.setdefault((key, 0) if np.isfinite(key) else (key, k), []).append(k)  # unknown: related to none
            documents = list(groups.values())
        if not self.pack:
            return [[document] for document in documents]
        need = self._lengths(source, index)
        limits = np.array(list(self.pack.values()))
        documents = [part for document in documents for part in _within(document, need, limits)]
        return pack(documents, np.array([need[d].sum(0) for d in documents]), limits.tolist())

    def _lengths(self, source: np.ndarray, index: np.ndarray) -> np.ndarray:
        """(B, modalities that are packed) tokens."""
        assert self.pack
        need = np.zeros((len(index), len(self.pack)), np.int64)
        for k in np.unique(source):
            mine = np.flatnonzero(source == k)
            lengths = self.sources[k].lengths(index[mine])
            for column, name in enumerate(self.pack):
                need[mine, column] = lengths.get(name, 0)
        return need


def _within(document: list[int], need: np.ndarray, limits: np.ndarray) -> list[list[int]]:
    """A joined document cut between samples where it would exceed a row."""
    parts: list[list[int]] = [[]]
    room = limits.copy()
    for sample in document:
        if parts[-1] and (need[sample] > room).any():
            parts.append([])
            room = limits.copy()
        parts[-1].append(sample)
        room = room - need[sample]
    return parts


def pack(documents: list[list[int]], need: np.ndarray, limits: Sequence[int]) -> list[list[list[int]]]:
    """First fit of the longest first: which documents share a row, such that no modality exceeds its limit.

    need: (documents, modalities) tokens. A document that is too long has a row of its own, which `collate` lets grow.
    """
    longest_first = np.argsort(-(need / np.asarray(limits)).max(1), kind="stable")
    free = np.empty((len(documents), len(limits)), np.int64)
    rows: list[list[list[int]]] = []
    for k in longest_first.tolist():
        fits = np.flatnonzero((free[: len(rows)] >= need[k]).all(1))
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = limits
        rows[row].append(documents[k])
        free[row] -= need[k]
    return rows
