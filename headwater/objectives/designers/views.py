"""Learned views: what is done to a signal before anything is hidden, and how strongly, or which of several families of views.

The learned sibling of the loader's own random views (`headwater.view`), whose strengths stand still.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import Rule
from headwater.model import Model
from headwater.objectives.designers.canvas import Layout, layout_of
from headwater.objectives.designers.changes import Change
from headwater.objectives.designers.designer import Designer, scaled
from headwater.objectives.objective import Batch, Objective, Term
from headwater.tokens import Tokens


class Views(Designer):
    """Changes the prepared tokens of a modality, one change after the other, with learned strengths.

    Every view of the modality that the objective reads ("image@0") is changed with draws of its own. What the objective looks at
    before, such as the features of a teacher, is of the unchanged signal.

    Args:
        model: tells how signals were cut.
        inner: tells which views are read, and whether labels of places are.
        modality: one whose tokens are vectors, or one view of it.
        changes: see headwater.objectives.designers.changes.
        start: strength of each to begin with, above 0 and below 1.
        learned: False = strengths stay as they start.
    """

    raw: Tensor

    def __init__(
        self, model: Model, inner: Objective, modality: str, changes: list[Change], start: float = 0.5, learned: bool = True
    ) -> None:
        super().__init__()
        self.names = tuple(name for name in inner.needs if modality in (name, name.partition("@")[0]))
        if not self.names:
            raise ValueError(f"found views of {modality!r}; the objective reads {', '.join(inner.needs)}")
        encoder = model.encoder(modality)
        if encoder.vocab is not None:
            raise ValueError(f"found views of {modality}, which is made of ids; views change numbers. Take SoftTargets for ids")
        if not 0 < start < 1:
            raise ValueError(f"found start={start}; expected a strength above 0 and below 1")
        self.layout: Layout = layout_of(encoder)
        for change in changes:
            change.check(self.layout)
            follow = [label for label, reader in inner.readers.items() if reader.follows in self.names]
            if change.moves and follow:
                raise ValueError(f"{type(change).__name__} would move {modality} away from its labels {', '.join(follow)}")
        self.changes = {called(k, changes): change for k, change in enumerate(changes)}
        self.first = torch.full((sum(len(change.knobs) for change in changes),), start, device="cpu").logit()
        if learned and len(self.first):
            self.raw = nn.Parameter(self.first.clone())
        else:
            self.register_buffer("raw", self.first.clone())

    def init_rules(self) -> dict[str, Rule]:
        return {"raw": Rule("fixed", self.first.clone)}

    def changed(self, batch: Batch) -> Batch:
        """The batch with other numbers in the tokens of the modality."""
        present = [name for name in self.names if name in batch] if self.changes else []
        return {**batch, **{name: self._changed(batch[name], batch["seed"], name) for name in present}}

    def _changed(self, t: Tokens, seed: Tensor, key: str) -> Tokens:
        with torch.autocast(t.x.device.type, enabled=False):  # pixels keep more than the 8 bits of bfloat16
            canvas, strengths = self.layout.canvas(t, seed), torch.sigmoid(self.raw).to(t.x.dtype)
            own = strengths.split([len(change.knobs) for change in self.changes.values()])
            for (name, change), strength in zip(self.changes.items(), own, strict=True):
                canvas = canvas._replace(x=change(canvas, strength, self.layout, f"view/{key}/{name}"))
            return self.layout.tokens(canvas.x, t)

    def design(self, inner: Objective, batch: Batch, hints: Any, ahead: bool) -> Batch:
        return inner.task(self.changed(batch), hints)

    def tell(self) -> dict[str, Tensor]:
        knobs = [f"{name}/{knob}" for name, change in self.changes.items() for knob in change.knobs]
        strengths = torch.sigmoid(self.raw.detach())
        return {name: strengths[k] for k, name in enumerate(knobs)}  # FSDP2 lets nobody go through them


class Families(Designer):
    """One of several families of views is drawn for each sample, with learned shares.

    The learner's step has the draw. The value has the expectation: the objective is asked for every family and each answer
    counts by its share, so that the gradient by the shares is exact where the objective takes samples one by one; one that
    compares samples is exact with per: batch. A look ahead costs as many passes as there are families.

    Args:
        model, inner, modality: see Views.
        families: name -> changes; an empty list = the signal as it is.
        per: what is drawn for. "batch": the same on all ranks, by the number of the step.
        start: name -> share to begin with, where shares are not equal.
        strength: of all changes.
        learned: strengths are learned too.
        seed: of draws per batch.
    """

    def __init__(
        self,
        model: Model,
        inner: Objective,
        modality: str,
        families: dict[str, list[Change]],
        per: Literal["sample", "batch"] = "sample",
        start: dict[str, float] | None = None,
        strength: float = 0.5,
        learned: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        first = torch.tensor([(start or {}).get(name, 1.0) for name in families], device="cpu")
        if len(families) < 2 or set(start or {}) - set(families) or min(first) <= 0:
            raise ValueError(
                f"found families {', '.join(families) or 'without any'} and start {start}; expected two or more to choose from, "
                "and shares above 0 of some of them"
            )
        made = {name: Views(model, inner, modality, changes, strength, learned) for name, changes in families.items()}
        self.views: Any = nn.ModuleDict(made)
        self.names = next(iter(made.values())).names
        self.per, self.seed, self.first = per, seed, (first / first.sum()).log()
        self.logits = nn.Parameter(self.first.clone())

    def init_rules(self) -> dict[str, Rule]:
        return {"logits": Rule("fixed", self.first.clone)}

    def design(self, inner: Objective, batch: Batch, hints: Any, ahead: bool) -> Batch:
        shares = torch.softmax(self.logits, -1)
        changed = [view.changed(batch) for view in self.views.values()]
        if ahead:
            return {"families": [{**inner.task(its, hints), "design": shares[k]} for k, its in enumerate(changed)]}
        draw = self._draw(batch)
        drawn = torch.searchsorted(shares.cumsum(0)[:-1].contiguous(), draw.to(shares.dtype), right=True)
        mixed = dict(batch)
        for number, its in enumerate(changed):
            for name in (n for n in self.names if n in batch):
                t = mixed[name]
                chosen = (drawn == number)[t.sample()]
                mixed[name] = t._replace(x=torch.where(chosen[..., None], its[name].x, t.x))
        return inner.task(mixed, hints)

    def _draw(self, batch: Batch) -> Tensor:
        """(S,) in [0, 1)."""
        if self.per == "sample":
            return random.uniform(batch["seed"], (), "family")
        one = random.seed_of(self.seed, batch.get("step", 0)) / (1 << 63)
        return torch.full_like(batch["seed"], one, dtype=torch.float64)

    def ask(self, inner: Objective, model: Model, task: Batch) -> dict[str, Term]:
        if "families" not in task:
            return inner(model, task)
        every = [scaled(inner(model, its), its["design"]) for its in task["families"]]
        totals = {name: torch.stack([terms[name].total for terms in every]).sum() for name in every[0]}
        return {name: term._replace(total=totals[name]) for name, term in every[0].items()}

    def tell(self) -> dict[str, Tensor]:
        told = dict(zip((f"share/{name}" for name in self.views), torch.softmax(self.logits.detach(), -1), strict=True))
        strengths = {name: view.tell() for name, view in self.views.items() if view.raw.requires_grad}
        return told | {f"{name}/{knob}": value for name, its in strengths.items() for knob, value in its.items()}


def called(number: int, changes: list[Change]) -> str:
    """The kind of a change, with its number among those of its kind where there are several."""
    kinds = [type(change).__name__.lower() for change in changes]
    return kinds[number] if kinds.count(kinds[number]) == 1 else f"{kinds[number]}{kinds[:number].count(kinds[number])}"
