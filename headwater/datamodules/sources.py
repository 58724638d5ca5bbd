"""Named sources of samples: shards with an index, read in any order."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater import random
from headwater.datamodules.collate import Sample
from headwater.datamodules.faults import PICKLES, said
from headwater.datamodules.files import Cache, File, expand, filesystem, insist, is_remote
from headwater.datamodules.index import Card, ShardIndex, fits, load_card, load_index
from headwater.datamodules.order import Order, Places
from headwater.datamodules.streams import Stream, fitting
from headwater.model import Reader
from headwater.view import View

OPEN = 256  # shards that one worker keeps open per source


@dataclass
class Source:
    """One stream of samples.

    Args:
        shards: a tar, folder, glob, brace range, "embedded:NAME", a URL that fsspec opens, or "pipe:COMMAND".
        weight: share of the steps, or of the samples, that come from here, relative to the other sources.
        modalities: encoders and labels that read from here; None = all whose members the shards hold.
        batch_size: samples per step over all ranks, where the data module's own does not fit this source.
        views: modalities that get a random view of each sample (crops, shifts).
        stream: how the members of a sample become tokens; None = each reader reads its own.
        cache: folder in which whole shards of a remote source are kept; None = they are read by ranges.
        cache_size: bytes that the cache may hold.
    """

    shards: str
    weight: float = 1.0
    modalities: list[str] | None = None
    batch_size: int | None = None
    views: list[str] | None = None
    stream: Stream | None = None
    cache: str | None = None
    cache_size: int = 100 << 30


class Read(NamedTuple):
    """One sample that was read. number: names it in all epochs; seed: differs from epoch to epoch; faults: what is missing."""

    sample: Sample
    number: int
    seed: int
    faults: list[str]


class OpenSource:
    """A source whose shards have an index: any sample at any time, exactly once per epoch.

    Args:
        name, source: as in the recipe. number: of the source, the upper bits of its sample numbers.
        readers: modality, or view of one -> reader. seed, window: of the order. views: those that the objective asks for.
        needs: what of the readers' names is read; None = all.
    """

    lost: tuple[str, ...] = ()  # guarantees that this source cannot give

    def __init__(
        self,
        name: str,
        source: Source,
        readers: dict[str, Reader],
        seed: int,
        window: int,
        number: int = 0,
        views: Mapping[str, View] | None = None,
        needs: Collection[str] | None = None,
    ) -> None:
        self.name, self.source, self.seed, self.number = name, source, seed, number
        self.cache = Cache(source.cache, source.cache_size) if source.cache else None
        paths = expand(source.shards)
        with ThreadPoolExecutor(32 if is_remote(paths[0]) else 1) as pool:  # a store takes its time for each
            self.cards: list[Card] = list(pool.map(self._card, paths))
        self.members = tuple(sorted({e for card in self.cards for e in card.extensions}))
        self.stream = source.stream or Stream()
        self.readers = chosen(name, source, readers, self.members, needs)
        self.views = viewed(source, self.readers, views or {})
        self.wanted = self.stream.wanted(self.readers, self.members)
        self.order = Order([card.samples for card in self.cards], random.seed_of(seed, *name.encode()), window)
        self._open: OrderedDict[int, tuple[ShardIndex, File]] = OrderedDict()
        self._window: list[int] = []

    @property
    def total(self) -> int:
        """Samples per epoch."""
        return self.order.total

    @property
    def faults(self) -> list[str]:
        """What the index could not use."""
        return [fault for card in self.cards for fault in card.faults]

    @property
    def hints(self) -> tuple[str, ...]:
        """Names of the facts that the indices hold."""
        return tuple(sorted({name for card in self.cards for name in card.hints}))

    def read(self, index: np.ndarray) -> list[Read]:
        """Samples of the order by their numbers (K,)."""
        if self.cache and len(index):
            self._fetch_ahead(int(index[0]))
        return self.at(self.order.places(index))

    def at(self, places: Places) -> list[Read]:
        """The samples that lie there."""
        numbers = (self.number << 40) + self.order.before[places.shard] + places.row
        seeds = random.seeds_of(self.seed, places.epoch, self.number, places.shard, places.row)
        views = drawn(self.views, self.readers, torch.from_numpy(seeds))
        found = self._contents(places)
        out = []
        columns = (numbers.tolist(), seeds.tolist(), places.shard.tolist(), places.row.tolist())
        for k, (number, seed, shard, row) in enumerate(zip(*columns)):
            sample, faults = self._sample(found[k], views[k], shard, row)
            out.append(Read(sample, number, seed, faults))
        return out

    def lengths(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """modality -> (K,) tokens that each sample will have there, by the facts of the index; 0 = it lacks the modality."""
        places = self.order.places(index)
        out = {name: np.zeros(len(index), np.int64) for name in self.readers}
        for k, (shard, row) in enumerate(zip(places.shard.tolist(), places.row.tolist())):
            for name, length in self.stream.lengths(self.readers, *self._facts(shard, row)).items():
                if length is None:
                    raise ValueError(
                        f"source {self.name}: the index does not tell how many tokens {name} has in "
                        f"{self.cards[shard].path}: {self._shard(shard)[0].key(row)}; `headwater index --measure` notes it "
                        "(with --tokenizer for texts), or take pack and arrange out"
                    )
                out[name][k] = length
        return out

    def hint(self, name: str, index: np.ndarray) -> np.ndarray:
        """(K,) float: one fact of the index for these samples, NaN where it is unknown."""
        places = self.order.places(index)
        return np.array([self._facts(int(s), int(r))[1].get(name, np.nan) for s, r in zip(places.shard, places.row)])

    def _facts(self, shard: int, row: int) -> tuple[dict[str, int], dict[str, float]]:
        """Bytes of each wanted member of a sample, and all hints of it."""
        index = self._shard(shard)[0]
        sizes = {e: size for e, _, size in index.extent(row, self.wanted).members}
        return sizes, {name: float(column[row]) for name, column in index.hints.items()}

    def _contents(self, places: Places) -> list[dict[str, bytes] | Exception]:
        """The members of every sample, or why they cannot be read. Ranges of a remote source are asked for together."""
        rows = list(zip(places.shard.tolist(), places.row.tolist()))
        if not self.cache and rows and is_remote(self.cards[rows[0][0]].path):
            with suppress(OSError):  # which of them fails shows when each is asked for alone
                return self._ranges(rows)
        return [attempt(self._local, shard, row) for shard, row in rows]

    def _local(self, shard: int, row: int) -> dict[str, bytes]:
        index, file = self._shard(shard)
        return index.read(file, row, self.wanted)

    def _ranges(self, rows: list[tuple[int, int]]) -> list[dict[str, bytes] | Exception]:
        extents = [self._shard(shard)[0].extent(row, self.wanted) for shard, row in rows]
        store = filesystem(self.cards[rows[0][0]].path)[0]
        paths = [filesystem(self.cards[shard].path)[1] for shard, _ in rows]
        starts, ends = [e.offset for e in extents], [e.offset + e.size for e in extents]
        found = insist(lambda: store.cat_ranges(paths, starts, ends, on_error="raise"))
        return [attempt(extent.cut, content) for extent, content in zip(extents, found, strict=True)]

    def _sample(
        self, members: dict[str, bytes] | Exception, views: dict[str, View], shard: int, row: int
    ) -> tuple[Sample, list[str]]:
        where = self.cards[shard].path
        if isinstance(members, Exception):
            return {}, [f"{where}: sample {row}: {said(members)}"]
        sample, faults = self.stream.tokens(self.readers, members, views)
        if not faults:
            return sample, []
        key = self._shard(shard)[0].key(row)
        return sample, [f"{where}: {key}.{self.readers[n].member(members)}: {said(error)}" for n, error in faults.items()]

    def _card(self, path: str) -> Card:
        if is_remote(path) and self.cache and not filesystem(path)[0].exists(f"{filesystem(path)[1]}.idx"):
            return load_card(self.cache.path(path))
        return load_card(path)

    def _shard(self, shard: int) -> tuple[ShardIndex, File]:
        """The index and file of a shard; the least recently used of many are closed."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.cards[shard].path
        index, file = load_index(path), File(self.cache.path(path) if self.cache and is_remote(path) else path)
        if len(index) != self.cards[shard].samples or (not is_remote(path) and not fits(index, file)):
            file.close()
            raise OSError(f"{path} has changed since it was indexed; run `headwater index {path}`")
        self._open[shard] = index, file
        if len(self._open) > OPEN:
            self._open.popitem(last=False)[1][1].close()
        return self._open[shard]

    def _fetch_ahead(self, index: int) -> None:
        window = self.order.upcoming(index)
        if window != self._window and self.cache:
            self._window = window
            self.cache.prefetch([self.cards[shard].path for shard in window])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_window": []}  # file descriptors do not cross processes


def chosen(
    name: str, source: Source, readers: dict[str, Reader], members: Collection[str], needs: Collection[str] | None = None
) -> dict[str, Reader]:
    """The readers that find a member in this source and are needed, checked before step 0 rather than in a worker.

    Where none of them is needed all are returned: whoever asks then says what is missing.
    """
    found = {k: r for k, r in readers.items() if (source.stream or Stream()).serves(k, r, members)}
    if source.modalities is not None:
        if lacking := [k for k in source.modalities if k not in found]:
            wanted = {k: readers[k].extensions if k in readers else "no encoder of that name" for k in lacking}
            raise ValueError(f"source {name} should give {lacking}, but its members are {tuple(members)}; expected {wanted}")
        found = {k: r for k, r in found.items() if k.partition("@")[0] in source.modalities}
    if not found:
        known = {k: r.extensions for k, r in readers.items()}
        raise ValueError(f"source {name} has the members {tuple(members)}, which no encoder reads; the encoders read {known}")
    if wrong := [view for view in source.views or () if view not in found]:
        warnings.warn(f"source {name} has no {wrong} to give views of; expected some of {list(found)}", stacklevel=2)
    for modality, reader in found.items():
        if unsafe := PICKLES & {e.rpartition(".")[2] for e in reader.extensions}:
            raise ValueError(f"the reader of {modality} asks for {unsafe}, which are pickles; a pickle runs code and is never read")
        fitting(reader, reader.example(1, 0)[0])
    return {k: r for k, r in found.items() if needs is None or k in needs} or found


def viewed(source: Source, readers: dict[str, Reader], asked: Mapping[str, View]) -> dict[str, View]:
    """Every name of this source whose signals are seen in random views: those of the source, those that the objective asks for."""
    return {name: asked.get(name, View()) for name in readers if name in asked or name in (source.views or ())}


def drawn(views: Mapping[str, View], readers: Mapping[str, Reader], seeds: Tensor) -> list[dict[str, View]]:
    """For each sample's seed (K,): name -> its view, with a seed of its own; what follows another modality has that one's."""
    every = {name: random.fold(seeds, name).tolist() for name in views}
    made = [{name: replace(view, seed=every[name][k]) for name, view in views.items()} for k in range(len(seeds))]
    for name, reader in readers.items():
        if (leader := reader.follows) is not None and leader in views:
            for sample in made:
                sample[name] = sample[leader]
    return made


def attempt(read: Callable[..., dict[str, bytes]], *where: Any) -> dict[str, bytes] | Exception:
    """What was read, or the error: it costs one sample, not the batch."""
    try:
        return read(*where)
    except OSError as error:
        return error
