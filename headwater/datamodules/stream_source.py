"""Sources without an index: pipes and HTTP streams, which can only be read from their head on."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from headwater import distributed, random
from headwater.datamodules.faults import said
from headwater.datamodules.files import expand, filesystem, is_remote
from headwater.datamodules.index import content_hash
from headwater.datamodules.sources import OpenSource, Read, Source, chosen, drawn, viewed
from headwater.datamodules.streams import Stream
from headwater.model import Reader
from headwater.view import View


class StreamSource:
    """A source without an index, a pipe or an HTTP stream, read through webdataset from its head on, again and again.

    Each loader process takes every n-th sample of the stream, or whole shards where there are enough.
    """

    lost = (
        "a run that goes on begins at the head of the stream again",
        "which samples share a batch depends on the number of ranks and workers",
        "samples are shuffled in a buffer only, and one epoch is not told from the next",
    )
    total = sys.maxsize
    faults: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

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
        self.name, self.source, self.seed, self.number, self.window = name, source, seed, number, window
        self.urls = expand(source.shards)
        self.stream = source.stream or Stream()
        self.broken: list[str] = []
        first = next(iter(self._samples(self.urls)), None)
        if first is None:
            raise ValueError(f"source {name} gave no sample from {self.urls[0]}: {'; '.join(self.broken) or 'it is empty'}")
        self.readers = chosen(name, source, readers, tuple(first[1]), needs)
        self.views = viewed(source, self.readers, views or {})
        self._passing: Iterator[tuple[int, str, dict[str, bytes]]] | None = None

    def read(self, index: np.ndarray) -> list[Read]:
        """The next samples that this process meets; which numbers were asked for does not matter."""
        if self._passing is None:
            self._passing = self._endless()
        out = []
        for _ in range(len(index)):
            time, key, members = next(self._passing)
            number = (self.number << 40) + (content_hash(key.encode()) & ((1 << 40) - 1))
            seed = random.seed_of(self.seed, time, self.number, number)
            views = drawn(self.views, self.readers, torch.tensor([seed]))[0]
            sample, faults = self.stream.tokens(self.readers, members, views)
            broken, self.broken = self.broken, []
            out.append(Read(sample, number, seed, [*broken, *(f"{key}.{n}: {said(error)}" for n, error in faults.items())]))
        return out

    def lengths(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Cannot be known."""
        raise ValueError(f"source {self.name} is a stream without an index; it cannot be packed or arranged by length")

    def hint(self, name: str, index: np.ndarray) -> np.ndarray:
        """Cannot be known either."""
        return np.full(len(index), np.nan)

    def _endless(self) -> Iterator[tuple[int, str, dict[str, bytes]]]:
        """How many times the stream was read before, key and members."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, count = distributed.rank() * workers + number, distributed.world() * workers
        whole = len(self.urls) >= count
        urls = self.urls[reader::count] if whole else self.urls
        empty = time = 0
        while empty < 3:
            empty += 1
            for place, (key, members) in enumerate(self._samples(urls, time)):
                if whole or place % count == reader:
                    empty = 0
                    yield time, key, members
            time += 1
        raise RuntimeError(f"source {self.name}: the stream {urls[0]} gave no sample three times: {'; '.join(self.broken)}")

    def _samples(self, urls: Sequence[str], time: int = 0) -> Iterator[tuple[str, dict[str, bytes]]]:
        import webdataset

        def note(error: Exception) -> bool:
            self.broken.append(said(error))
            return True

        stages = [webdataset.SimpleShardList(list(urls)), webdataset.tarfile_to_samples(handler=note)]
        if self.window:
            stages.append(webdataset.shuffle(1000, rng=Random(random.seed_of(self.seed, time))))
        for sample in webdataset.DataPipeline(*stages):
            yield sample["__key__"], {k.lower(): v for k, v in sample.items() if isinstance(v, bytes)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passing": None}


def open_source(
    name: str,
    source: Source,
    readers: dict[str, Reader],
    seed: int,
    window: int,
    number: int = 0,
    views: Mapping[str, View] | None = None,
    needs: Collection[str] | None = None,
) -> OpenSource | StreamSource:
    """With an index where there is or can be one, else as a stream."""
    return (StreamSource if is_stream(source) else OpenSource)(name, source, readers, seed, window, number, views, needs)


def is_stream(source: Source) -> bool:
    """True for what can only be read from its head on: a pipe, or a remote shard without index and cache."""
    if source.shards.startswith("pipe:"):
        return True
    if not is_remote(source.shards) or source.cache:
        return False
    try:
        first = expand(source.shards)[0]
        store, name = filesystem(first)
        return not store.exists(f"{name}.idx")
    except NotImplementedError:  # a store that cannot tell cannot be read by ranges either
        return True
