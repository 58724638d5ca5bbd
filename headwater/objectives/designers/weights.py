"""How much each source of the data, or each part of a weighted sum, counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import ZERO, Rule
from headwater.model import Model
from headwater.objectives.designers.designer import Designer, rows_of, scaled, shares
from headwater.objectives.objective import Batch, Objective, Term


class SourceWeights(Designer):
    """One weight per group of samples, softmax(logits) * groups: by the source that they come from, or by a label.

    The objective is asked for each group of the batch by itself, whose terms are then weighted and added up; so any objective
    will do, and one that compares samples compares those of a group. Beside a data module with `unit: sample`, which mixes all
    sources in every batch.

    Args:
        model, inner: not read.
        groups: how many there are.
        key: batch entry (S,) of the number of each sample's group.
    """

    def __init__(self, model: Model, inner: Objective, groups: int, key: str = "origin") -> None:
        super().__init__()
        if groups < 2:
            raise ValueError(f"found {groups} groups; expected two or more to weigh against each other")
        self.key, self.logits = key, nn.Parameter(torch.zeros(groups))

    def init_rules(self) -> dict[str, Rule]:
        return {"logits": ZERO}

    def parted(self, batch: Batch) -> dict[int, Batch]:
        """Group -> its samples. Every rank has every group, since objectives may exchange vectors."""
        if self.key not in batch:
            raise ValueError(f"the batch has no {self.key!r}, the group of each sample; it has {', '.join(batch)}")
        group = batch[self.key]
        return {number: rows_of(batch, group == number) for number in range(len(self.logits))}

    def look(self, inner: Objective, model: Model, batch: Batch, ahead: bool) -> dict[int, Any]:
        return {number: inner.look(model, part) for number, part in self.parted(batch).items()}

    def design(self, inner: Objective, batch: Batch, hints: dict[int, Any], ahead: bool) -> Batch:
        weights = shares(self.logits)
        tasks = {n: {**inner.task(part, hints[n]), "design": weights[n]} for n, part in self.parted(batch).items()}
        return {"groups": tasks}

    def numbers(self, inner: Objective, task: Batch) -> dict[str, Tensor]:
        every = [inner.numbers(part) for part in task["groups"].values()]
        return {name: torch.stack([numbers[name] for numbers in every]).sum() for name in every[0]}

    def ask(self, inner: Objective, model: Model, task: Batch) -> dict[str, Term]:
        every = [scaled(inner(model, part), part["design"]) for part in task["groups"].values()]
        return {
            name: first._replace(
                total=torch.stack([terms[name].total for terms in every]).sum(),
                number=torch.stack([terms[name].number for terms in every]).sum(),
            )
            for name, first in every[0].items()
        }

    def tell(self) -> dict[str, Tensor]:
        return {f"weight/{number}": weight for number, weight in enumerate(shares(self.logits.detach()))}


class PartWeights(Designer):
    """One weight per part of a `Weighted` objective, or one part drawn for each step.

    Parts may be different objectives, or one objective with several views, masks or targets; so this is also how one of K tasks
    is chosen: the value of each is an inner product of ordinary gradients, and that of the draw is their mean under the shares,
    so that its gradient by the logits is exact.

    Args:
        model: not read.
        inner: gives the names of the parts.
        draw: True = the learner's step has one part, drawn with the shares; else all of them, weighted.
        start: part -> its share to begin with, where shares are not equal.
        seed: of the draws.
    """

    def __init__(
        self, model: Model, inner: Objective, draw: bool = False, start: dict[str, float] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.names = tuple(getattr(inner, "parts", ()))
        if len(self.names) < 2:
            raise ValueError(f"found {type(inner).__name__} with parts {self.names}; expected a Weighted objective of several")
        if stray := set(start or {}) - set(self.names):
            raise ValueError(f"start names {', '.join(sorted(stray))}; the parts are {', '.join(self.names)}")
        first = torch.tensor([(start or {}).get(name, 1.0) for name in self.names])
        self.draw, self.seed, self.first = draw, seed, first.log()
        self.logits = nn.Parameter(self.first.clone())

    def init_rules(self) -> dict[str, Rule]:
        return {"logits": Rule("fixed", self.first.clone)}

    def design(self, inner: Objective, batch: Batch, hints: Any, ahead: bool) -> Batch:
        weights = shares(self.logits)
        if self.draw and not ahead:
            draw = random.seed_of(self.seed, batch.get("step", 0)) / (1 << 63) * len(weights)
            drawn = min(int((weights.cumsum(0) < draw).sum()), len(weights) - 1)
            batch, weights = {**batch, "parts": [self.names[drawn]]}, torch.ones_like(weights)
        weight = dict(zip(self.names, weights / (len(weights) if self.draw and ahead else 1), strict=True))
        return {**inner.task(batch, hints), "design": weight}

    def ask(self, inner: Objective, model: Model, task: Batch) -> dict[str, Term]:
        terms = inner(model, task)
        return {name: scaled({name: term}, task["design"][name.partition("/")[0]])[name] for name, term in terms.items()}

    def tell(self) -> dict[str, Tensor]:
        return {
            f"share/{name}": share / len(self.names) for name, share in zip(self.names, shares(self.logits.detach()), strict=True)
        }
