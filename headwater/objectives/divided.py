"""A loss as the sum of parts whose gradients are asked for one by one: objectives, terms, or groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headwater import distributed
from headwater.model import Model
from headwater.objectives.designers.designer import rows_of
from headwater.objectives.objective import Batch, Objective, Term
from headwater.objectives.probe import Ask, Probe

Parts = dict[str, list[Ask]]  # name -> what is asked, one piece of the batch after the other


class Piece(NamedTuple):
    """Some terms of the task that was made of some rows."""

    task: Batch
    terms: tuple[str, ...]
    numbers: dict[str, Tensor]


class Groups:
    """Parts are groups of samples, by the source that they come from or by a label, instead of terms of the loss.

    Beside a data module with `unit: sample`, which mixes all sources in every batch. An objective that compares samples compares
    those of a group.

    Args:
        number: how many there are.
        key: batch entry (S,) of the number of each sample's group.
    """

    def __init__(self, number: int, key: str = "origin") -> None:
        if number < 2:
            raise ValueError(f"found {number} groups; expected two or more")
        self.number, self.key = number, key

    def rows(self, batch: Batch) -> dict[str, Batch]:
        """Group -> its samples. Every rank has every group, so that all ask the same number of times."""
        if self.key not in batch:
            raise ValueError(f"the batch has no {self.key!r}, the group of each sample; it has {', '.join(batch)}")
        return {f"{self.key}{number}": rows_of(batch, batch[self.key] == number) for number in range(self.number)}


def divided(probe: Probe, inner: Objective, model: Model, batch: Batch, groups: Groups | None = None) -> Parts:
    """The parts of what `inner` asks of a batch, in each of which every target has the weight that it has in the whole.

    Without `groups` they are the parts of a `Weighted` that this batch serves; of any other objective its terms, each of which
    costs a pass through all of it. What is cut into pieces to save memory is here too; groups, being pieces, are not cut again.
    """

    def task(part: Batch) -> Batch:
        return inner.task(part, inner.look(model, part))

    with torch.no_grad(), probe.still():
        if groups is not None:
            tasks = {name: probe.call(partial(task, part)) for name, part in groups.rows(batch).items()}
            pieces = {name: [Piece(made, tuple(n), n)] for name, made in tasks.items() for n in [inner.numbers(made)]}
        else:
            pieces = {}
            for part in inner.pieces(batch, probe.micro):
                for name, piece in by_term(inner, probe.call(partial(task, part))).items():
                    pieces.setdefault(name, []).append(piece)
            order = [name for name in getattr(inner, "parts", {}) if name in pieces] or list(pieces)
            pieces = {name: pieces[name] for name in order}  # however the batch was cut
    probe.let_go()
    shares = iter(shared([piece for part in pieces.values() for piece in part]))
    return {name: [partial(ask, inner, model, piece, next(shares)) for piece in part] for name, part in pieces.items()}


def by_term(inner: Objective, task: Batch) -> dict[str, Piece]:
    """The parts of a weighted sum, each without the others' entries in the task; else every term by itself."""
    numbers = inner.numbers(task)
    every = getattr(inner, "parts", {})
    running = [name for name in every if name in task]
    if not running or {name.partition("/")[0] for name in numbers} != set(running):
        return {name: Piece(task, (name,), {name: n}) for name, n in numbers.items()}
    found = {}
    for name in running:
        own = {term: n for term, n in numbers.items() if term.partition("/")[0] == name}
        found[name] = Piece({k: v for k, v in task.items() if k == name or k not in every}, tuple(own), own)
    return found


def shared(pieces: Sequence[Piece]) -> list[dict[str, float]]:
    """Of the targets that each term has in all pieces on all ranks, the share that each piece has."""
    counts = distributed.total(torch.stack([n.long() for piece in pieces for n in piece.numbers.values()])).tolist()
    left, totals = iter(counts), dict[str, int]()
    found = [{name: next(left) for name in piece.numbers} for piece in pieces]
    for own in found:
        for name, n in own.items():
            totals[name] = totals.get(name, 0) + n
    return [{name: n / max(totals[name], 1) for name, n in own.items()} for own in found]


def ask(inner: Objective, model: Model, piece: Piece, share: dict[str, float]) -> dict[str, Term]:
    """The terms of a piece, so weighted that those of all pieces add up to the whole loss."""
    terms = inner(model, piece.task)
    return {name: terms[name]._replace(weight=terms[name].weight * share[name]) for name in piece.terms}


def gradient(probe: Probe, asks: Sequence[Ask]) -> list[Tensor]:
    """Of all pieces together, for every parameter of `probe.theta`."""
    found = probe.gradient(asks[0], probe.theta)[1]
    for piece in asks[1:]:
        found = [a + b for a, b in zip(found, probe.gradient(piece, probe.theta)[1], strict=True)]
    return found
