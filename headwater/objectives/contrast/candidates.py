"""Rows of a score matrix and the candidates that they are compared with: others of the batch, of their own side, of the past."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.objectives.contrast.losses import Loss
from headwater.objectives.contrast.positives import Facts, Positives, Target
from headwater.objectives.contrast.queue import Queue
from headwater.objectives.contrast.scores import Items, Score
from headwater.objectives.contrast.tiles import tiled


class Rows(NamedTuple):
    """The pairs of this rank, seen from one side. items, facts: (S, ...); own: (S,) the column of each one's partner."""

    items: Items
    facts: Facts
    own: Tensor


class Candidates(NamedTuple):
    """What rows are compared with, the same on all ranks. items, facts: (C, ...).

    there: (C,) False = an empty place. itself: a row is left out at its own column + itself; None = the rows are not among them.
    """

    items: Items
    facts: Facts
    there: Tensor | None = None
    itself: int | None = None

    def beside(self, items: Items, facts: Facts) -> Candidates:
        """With those of the rows' own side, of which a row leaves itself out."""
        return self._replace(items=longer(self.items, items), facts=longer(self.facts, facts), itself=len(self.items[0]))

    def behind(self, queue: Queue) -> Candidates:
        """With the keys of past steps."""
        keys, width = queue.keys(), len(self.items)
        there = F.pad(queue.there(), (len(self.items[0]), 0), value=True)
        return self._replace(items=longer(self.items, keys[:width]), facts=longer(self.facts, keys[width:]), there=there)

    def left_out(self, own: Tensor) -> Tensor | None:
        """(A, C) True = neither answer nor candidate of a row."""
        if self.there is None and self.itself is None:
            return None
        out = self.items[0].new_zeros(len(own), len(self.items[0]), dtype=torch.bool)
        out = out if self.there is None else out | ~self.there
        return out if self.itself is None else out.scatter(1, own[:, None] + self.itself, True)


def contrast(score: Score, loss: Loss, positives: Positives, rows: Rows, candidates: Candidates, tile: int) -> Tensor:
    """What each row adds to the loss, (S,) or (S, K); summed over ranks it is that of one process on the whole batch.

    tile: numbers that exist at once. `Softmax`: loss_i = - sum_j T_ij log( e^{S_ij} / sum_k w_ik e^{S_ik} ).
    """
    width = len(rows.items)

    def block(own: Tensor, *given: Tensor) -> Tensor:
        logits = loss.logits(score(given[:width], candidates.items))
        return loss.rows(logits, target(positives, candidates, given[width:], own, logits.detach()))

    numbers = len(candidates.items[0]) * score.cost(rows.items, candidates.items)
    return torch.cat(tiled(block, (rows.own, *rows.items, *rows.facts), numbers, tile))


@torch.no_grad()
def target(positives: Positives, candidates: Candidates, facts: Facts, own: Tensor, logits: Tensor) -> Target:
    """What the providers say of a block of rows, without what is left out. logits: (A, C)."""
    out = candidates.left_out(own)
    if out is None:
        return positives(facts, candidates.facts, own, logits)
    said = positives(facts, candidates.facts, own, logits.masked_fill(out, -torch.inf))
    log_w = torch.zeros_like(logits) if said.log_w is None else said.log_w
    return Target(said.t.masked_fill(out, 0), log_w.masked_fill(out, -torch.inf))


def longer(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors (A, ...) and (B, ...), one by one joined to (A + B, ...)."""
    return tuple(torch.cat([a, b.to(a.dtype)]) for a, b in zip(x, y, strict=True))
