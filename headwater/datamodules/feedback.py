"""Feedback: batches of a small source of their own, such as one with labels, that come beside those of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headwater import random
from headwater.datamodules.mixture import Ledger
from headwater.datamodules.order import Places
from headwater.datamodules.plan import Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Read, Source
from headwater.datamodules.stream_source import is_stream, open_source
from headwater.model import Reader
from headwater.objectives.objective import Objective


@dataclass
class Feedback:
    """The source of feedback. How often a batch of it comes, and what must be in it, the objective says.

    Args:
        source: of the samples; its weight counts nothing.
        batch_size: samples per batch of feedback over all ranks.
        shuffled: modalities or labels that every sample has from a drawn one of the source, always the same. Feedback whose labels
            are shuffled tells nothing, which makes it the control for feedback that should.
    """

    source: Source
    batch_size: int = 32
    shuffled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"found a batch_size of {self.batch_size} for feedback; expected 1 sample or more")


class FedDataset(ShardDataset):
    """Batches of training, and on every `every`-th step of the run one of feedback under "feedback", a batch of the same kind.

    The feedback of step s is batch number s // every of its own order, so that it too is a pure function of the step.

    Args:
        main: batches of training. feedback: the order of the other ones. every: steps between them. start: where the run begins.
    """

    def __init__(self, main: ShardDataset, feedback: Plan, every: int, start: int = 0) -> None:
        super().__init__(main.plan, main.rank, main.world, main.first, main.steps, main.buckets)
        self.feedback, self.every, self.start = ShardDataset(feedback, main.rank, main.world, buckets=main.buckets), every, start

    def batch(self, step: int) -> dict[str, Any]:
        batch = super().batch(step)
        if (step - self.start) % self.every:
            return batch
        feedback = self.feedback.batch(step // self.every)
        return {**batch, "feedback": feedback, "faults": [*batch["faults"], *feedback.pop("faults")]}


class Exchanged(OpenSource):
    """A source in which every sample has some modalities from a sample that was drawn for it once.

    Args:
        names: of these modalities. opened: what OpenSource takes.
    """

    def __init__(self, names: list[str], *opened: Any) -> None:
        super().__init__(*opened)
        self.names = names
        self.partner = np.random.default_rng(random.seed_of(self.seed, *b"exchanged")).permutation(self.total)

    def read(self, index: np.ndarray) -> list[Read]:
        places, before = self.order.places(index), self.order.before
        other = self.partner[before[places.shard] + places.row]
        shard = np.searchsorted(before, other, side="right") - 1
        there = self.at(Places(places.epoch, shard, other - before[shard]))
        return [self._exchanged(one, two) for one, two in zip(self.at(places), there, strict=True)]

    def _exchanged(self, one: Read, two: Read) -> Read:
        kept = {name: t for name, t in one.sample.items() if name not in self.names}
        given = {name: t for name, t in two.sample.items() if name in self.names}
        return one._replace(sample=kept | given, faults=[*one.faults, *two.faults])


def open_feedback(
    feedback: Feedback | None, objective: Objective, readers: Mapping[str, Reader], seed: int, window: int, number: int
) -> Plan | None:
    """The order of the feedback, one sample per row, or None where there is none. number: of its source, behind all others.

    Raises ValueError where the objective asks for feedback that the data lacks, or the data has feedback that nothing asks for.
    """
    needs, asks = objective.feedback_needs, type(objective).__name__
    if feedback is None and not needs:
        return None
    if feedback is None:
        raise ValueError(
            f"{asks} needs feedback with {', '.join(needs)}, and the data has none; name its shards, for example "
            "--data.feedback.source.shards FOLDER"
        )
    if not needs:
        raise ValueError(
            f"found data.feedback, for which {asks} does not ask; train with an objective that does, such as VPretraining, or take "
            "the feedback out"
        )
    if feedback.shuffled and is_stream(feedback.source):
        raise ValueError("found shuffled feedback from a stream without an index, which cannot look anything up; give it a cache")
    given = ("feedback", feedback.source, dict(readers), seed, window, number, objective.views, needs)
    opened = Exchanged(feedback.shuffled, *given) if feedback.shuffled else open_source(*given)
    if lacking := [name for name in dict.fromkeys((*needs, *feedback.shuffled)) if name not in opened.readers]:
        shuffled = f" and {', '.join(feedback.shuffled)} to be shuffled" if feedback.shuffled else ""
        raise ValueError(
            f"the feedback provides {', '.join(opened.readers)}, but {asks} needs {', '.join(needs)} in it{shuffled}: found no "
            f"{', '.join(lacking)}. Add shards with these members, or change what is asked for"
        )
    return Plan([opened], Ledger([1.0]), feedback.batch_size, seed=seed)
