"""The batches of one rank, made by any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from headwater.datamodules.collate import Sample, collate
from headwater.datamodules.plan import Plan, Step
from headwater.datamodules.sources import Read
from headwater.datamodules.streams import join
from headwater.tokens import Tokens

SMALL = 1 << 16  # bytes
NOBODY = -1  # the number of the row that stands in on a rank without samples


class ShardDataset(IterableDataset):
    """One batch per optimizer step from step `first` on; each worker makes every workers-th of them.

    Args:
        plan: of the run. rank, world: whose rows. first: step to begin with. steps: where to end; None = never.
        buckets: see `collate`.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        steps: int | None = None,
        buckets: dict[str, int] | None = None,
    ) -> None:
        self.plan, self.rank, self.world, self.first, self.steps, self.buckets = plan, rank, world, first, steps, buckets
        self.joins = plan.arrange is not None and plan.arrange.join
        self.closing = torch.zeros((), dtype=torch.bool).share_memory_()  # the main process exits

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's rows of a step, every modality that its sources have, and for each sample its number, seed and source."""
        planned = self.plan.step(step)
        sources = [self.plan.sources[k] for k in np.unique(planned.source)]
        names = list(dict.fromkeys(name for source in sources for name in source.readers))
        mine = planned.of_rank(self.rank, self.world)
        read = self._read(mine)
        samples = [one.sample for one in read]
        rows = None
        if mine.rows is not None:
            rows = [[document[0] for document in row] for row in mine.rows]
            for document in (d for row in mine.rows for d in row if self.joins):  # those of one sample too: all have an order
                samples[document[0]] = join([samples[s] for s in document])  # it bears the number and seed of its first sample
        present = [name for name in names if any(name in sample for sample in samples)]
        batch: dict[str, Any] = collate(samples, present, rows, self.buckets)
        for name in names:
            if name not in batch:  # every one of this rank was undecodable, or it has no row: others must not wait for it
                batch[name] = self._nothing(sources, name, len(read) if rows is None else len(rows))
        return {
            **{name: batch[name] for name in names},
            "sample": torch.tensor([one.number for one in read] or [NOBODY], dtype=torch.int64),
            "seed": torch.tensor([one.seed for one in read] or [0], dtype=torch.int64),
            "origin": torch.tensor([self.plan.sources[k].number for k in mine.source.tolist()] or [0], dtype=torch.int64),
            "faults": [fault for one in read for fault in one.faults],
        }

    def _read(self, step: Step) -> list[Read]:
        """The samples of a step in its order, each source asked once."""
        read: list[Any] = [None] * len(step.place)
        for k in np.unique(step.source):
            mine = np.flatnonzero(step.source == k)
            for number, one in zip(mine.tolist(), self.plan.sources[k].read(step.place[mine]), strict=True):
                read[number] = one
        return read

    def _nothing(self, sources: list[Any], name: str, rows: int) -> Any:
        """Rows of a modality without one valid token; at least one row, for what cannot do without."""
        stand_in: Sample = {name: next(s for s in sources if name in s.readers).readers[name].example(1, 0)[0]}
        filled = collate([join([stand_in]) if self.joins else stand_in] * max(1, rows), [name], None, self.buckets)[name]
        return filled._replace(valid=torch.zeros_like(filled.real()))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1) if worker else None
        step = self.first + number
        while self.steps is None or step < self.steps:
            yield Parcel(self.batch(step)) if worker else self.batch(step)
            step += workers


class Parcel(dict):
    """A batch on its way out of a worker; on the other side it is a plain dict.

    A tensor in shared memory costs a file descriptor and several system calls, so small ones travel inside the message.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (_each(dict(self), _shrunk),)


def _opened(parcel: dict[str, Any]) -> dict[str, Any]:
    return _each(parcel, _grown)


def _each(value: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):  # a batch within the batch
        return {name: _each(inside, f) for name, inside in value.items()}
    return Tokens(*map(f, value)) if isinstance(value, Tokens) else f(value)


def _shrunk(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) and value.numel() * value.element_size() <= SMALL else value


def _grown(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
