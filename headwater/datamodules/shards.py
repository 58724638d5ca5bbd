"""From shards to samples: which files a pattern means, and reading sample after sample in the planned order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from headwater import random
from headwater.datamodules.collate import Sample, collate
from headwater.datamodules.index import ShardIndex, load_index
from headwater.datamodules.order import Order, turn
from headwater.embedded import place
from headwater.model import Reader
from headwater.tokens import Tokens


def expand(pattern: str) -> list[str]:
    """The tars that a pattern means, sorted.

    A folder means all tars in it; globs and brace ranges {000..012} are expanded; "embedded:NAME" is a file or glob among the
    shards that ship inside the package.
    """
    found = []
    for one in _braces(place(pattern)):
        found += (
            sorted(glob.glob(os.path.join(glob.escape(one), "*.tar"))) if os.path.isdir(one) else sorted(glob.glob(one)) or [one]
        )
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        where = missing[0] if missing else pattern
        raise FileNotFoundError(
            f"found no shard at {where}; expected a tar, a folder of tars or a glob that matches some. "
            "Make shards with `headwater shard DIR out/`"
        )
    return found


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [p for n in numbers for p in _braces(pattern[: match.start()] + n + pattern[match.end() :])]


@dataclass
class Source:
    """One stream of samples.

    Args:
        shards: a tar, folder, glob, brace range or "embedded:NAME".
        weight: share of the steps, or of the samples, that come from here, relative to the other sources.
        modalities: encoders that read from here; None = all whose members the shards hold.
        batch_size: samples per step over all ranks, where the data module's own does not fit this source.
        views: modalities that get a random view of each sample (crops, shifts).
    """

    shards: str
    weight: float = 1.0
    modalities: list[str] | None = None
    batch_size: int | None = None
    views: list[str] | None = None


class OpenSource:
    """A source with its index loaded and its readers chosen."""

    def __init__(self, name: str, source: Source, readers: dict[str, Reader], seed: int, window: int) -> None:
        self.name, self.source = name, source
        self.shards: list[ShardIndex] = [load_index(path) for path in expand(source.shards)]
        self.members = tuple(sorted({e for shard in self.shards for e in shard.extensions}))
        self.readers = {k: r for k, r in readers.items() if r.member(self.members)}
        if source.modalities is not None:
            if lacking := [k for k in source.modalities if k not in self.readers]:
                wanted = {k: readers[k].extensions if k in readers else "no encoder of that name" for k in lacking}
                raise ValueError(f"source {name} should give {lacking}, but its members are {self.members}; expected {wanted}")
            self.readers = {k: self.readers[k] for k in source.modalities}
        if not self.readers:
            known = {k: r.extensions for k, r in readers.items()}
            raise ValueError(f"source {name} has the members {self.members}, which no encoder reads; the encoders read {known}")
        for reader in self.readers.values():
            fitting(reader, reader.example(1, 0)[0])  # before step 0 rather than in a worker, or in the export at the end
        self.order = Order([len(shard) for shard in self.shards], random.seed_of(seed, *name.encode()), window)
        self._files: dict[int, int] = {}

    @property
    def faults(self) -> list[str]:
        """What the index could not use."""
        return [fault for shard in self.shards for fault in shard.faults]

    def read(self, index: int, seed: int) -> tuple[Sample, list[str]]:
        """Sample number `index` of the order -> its modalities, and what was wrong with those that are missing."""
        epoch, shard, row = self.order[index]
        members = self.shards[shard].read(self._descriptor(shard), row)
        sample, faults = {}, []
        for name, reader in self.readers.items():
            member = reader.member(members)
            if member is None:
                continue
            try:
                signal = reader.decode(members)
                view = self._view(name, seed, epoch, shard, row)
                sample[name] = fitting(reader, reader.tokens(signal, view))
            except Exception as error:  # any decoder may raise anything on damaged bytes; the sample is named, not lost
                where = f"{self.shards[shard].path}: {self.shards[shard].keys[row]}.{member}"
                said = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # the same fault reads the same each time
                faults.append(f"{where}: {type(error).__name__}: {said}")
        return sample, faults

    def _view(self, name: str, seed: int, epoch: int, shard: int, row: int) -> torch.Tensor | None:
        if name not in (self.source.views or ()):
            return None
        return random.fold(torch.tensor(random.seed_of(seed, epoch, shard, row)), name)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # file descriptors do not cross processes


def fitting(reader: Reader, t: Tokens) -> Tokens:
    """The tokens of one sample, if they have the shape that the reader promises."""
    if not isinstance(t, Tokens):
        raise ValueError(f"{type(reader).__name__}.tokens gave a {type(t).__name__}; expected Tokens(x, position)")
    promised = (t.x.shape[0], *(() if reader.vocab else (reader.features,)))
    if tuple(t.x.shape) != promised or t.position.ndim != 2 or len(t.position) != len(t.x):
        raise ValueError(
            f"{type(reader).__name__}.tokens gave x {tuple(t.x.shape)} and position {tuple(t.position.shape)}; expected x "
            f"{promised} by its features and vocab, and position (N, P)"
        )
    return t


class ShardDataset(IterableDataset):
    """Batches of a rank, one per optimizer step, from step `first` on; each worker makes every workers-th of them.

    Args:
        sources: opened sources.
        unit: "batch" = each step comes from one source, in turn by weight; "sample" = each step mixes all by weight.
        batch_size: samples per step over all ranks.
        seed, rank, world, first: of the run.
        steps: where to end; None = never.
        pack: passed to `collate`.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        unit: str,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        steps: int | None = None,
        pack: dict[str, int] | None = None,
    ) -> None:
        self.sources, self.unit, self.batch_size, self.seed = list(sources), unit, batch_size, seed
        self.rank, self.world, self.first, self.steps, self.pack = rank, world, first, steps, pack
        self.weights = [s.source.weight for s in self.sources]

    def plan(self, step: int) -> list[tuple[int, int]]:
        """The global batch of a step as (source, index in its order)."""
        if self.unit == "sample":
            first = step * self.batch_size
            return [turn(first + i, self.weights) for i in range(self.batch_size)]
        source, before = turn(step, self.weights)
        size = self.sources[source].source.batch_size or self.batch_size
        return [(source, before * size + i) for i in range(size)]

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's rows of a step: every world-th of the global batch."""
        plan = self.plan(step)
        names = list(dict.fromkeys(k for source in sorted({s for s, _ in plan}) for k in self.sources[source].readers))
        read = [self.sources[source].read(index, self.seed) for source, index in plan[self.rank :: self.world]]
        present = [k for k in names if any(k in sample for sample, _ in read)]
        batch: dict[str, Any] = collate([sample for sample, _ in read], present, self.pack)
        for name in set(names) - set(present):  # every one of this rank was undecodable; other ranks must not wait for it
            batch[name] = self._nothing(plan, name, batch[present[0]].position.shape[0] if present else len(read))
        ids = [self.identity(source, index) for source, index in plan[self.rank :: self.world]]
        batch["sample"] = torch.tensor([i for i, _ in ids])
        batch["seed"] = torch.tensor([s for _, s in ids])
        batch["faults"] = [fault for _, faults in read for fault in faults]
        return {name: batch[name] for name in [*names, "sample", "seed", "faults"]}

    def _nothing(self, plan: list[tuple[int, int]], name: str, rows: int) -> Tokens:
        """Rows of a modality without one valid token."""
        source = next(s for s, _ in plan if name in self.sources[s].readers)
        stand_in = self.sources[source].readers[name].example(1, 0)[0]
        filled = collate([{name: stand_in}] * rows, [name])[name]
        return filled._replace(valid=torch.zeros_like(filled.real()))

    def identity(self, source: int, index: int) -> tuple[int, int]:
        """A number that names the sample in all epochs, and its seed, which differs from epoch to epoch."""
        epoch, shard, row = self.sources[source].order[index]
        before = int(self.sources[source].order.sizes[:shard].sum())
        return (source << 40) + before + row, random.seed_of(self.seed, epoch, source, shard, row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1) if worker else None
        step = self.first + number
        while self.steps is None or step < self.steps:
            yield self.batch(step)
            step += workers
