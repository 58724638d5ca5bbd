"""Denoising of ids: documents are corrupted, and the model writes what is missing, or all of it (T5, BART, UL2, PEGASUS).

What is seen (source) and what is asked for (target) are one sequence in one stack: the source sees itself in both directions,
the target sees the source and what was written before (prefix language model), so that any encoder of ids that can be causal can
learn it. Or the source goes to an encoder of its own, which a fusion joins to the one that writes (encoder-decoder).

T5: Raffel et al. 2019, arXiv:1910.10683; a mixture with a mode token for each: UL2, Tay et al. 2022, arXiv:2205.05131.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.model import Model
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.noise.denoisers import Denoiser, SpanCorruption
from headwater.objectives.noise.operators import Ids, beginning
from headwater.objectives.objective import Batch, Objective, Schedule, Term, check_context, part
from headwater.objectives.weighted import Draw
from headwater.sequence import orders, shift
from headwater.tokens import Tokens, concat


class Denoising(Objective):
    """Corrupts documents of ids and asks for what a denoiser says.

    The source begins with the mode token of its denoiser, if that has one. Where documents end with the reader's end mark, it is
    left alone and ends the target and, but for a `Prefix`, the source. The reader's extra ids are modes up to the largest `mode`
    of a denoiser, and behind it the marks of what is hidden.

    Args:
        model: the encoder's `unembed` answers, so what is learned here can generate.
        modality: made of ids.
        denoisers: name -> denoiser, of which one is drawn for each sample; None = span corruption alone.
        shares: name -> how likely it is drawn, a number or a schedule over the run; 1 where a name is missing.
        into: the encoder that the source goes to, one with as many ids; None = both go through the encoder of the modality.
        context: other modalities that are known from the beginning, through the model's fusion.
        places: where tokens stand. "running" = one after the other, first the source. "blanks" = those of a span stand at its mark
            in the source, and count up along a second coordinate (GLM, Du et al. 2021, arXiv:2103.10360).
        likelihood: what a token costs, given the probability of the right one; None = -log p.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        denoisers: dict[str, Denoiser] | None = None,
        shares: dict[str, float | Schedule] | None = None,
        into: str | None = None,
        context: list[str] | None = None,
        places: Literal["running", "blanks"] = "running",
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.modality, self.into, self.denoisers = modality, into, denoisers or {"spans": SpanCorruption()}
        self.places = places
        self.draw, self.likelihood = Draw(shares, per="sample"), likelihood or Likelihood()
        self.needs = (modality, *(context or ()))
        self.seen = (*self.needs, into) if into else self.needs
        self.check(model)
        encoder = model.encoder(modality)
        self.start_id, self.end, self.classes = encoder.start, encoder.reader.end, encoder.vocab
        self.modes = [denoiser.mode for denoiser in self.denoisers.values()]
        self.extras, self.ids = encoder.reader.extras, self.allotted(model)

    def check(self, model: Model) -> None:
        """Refuse what cannot work."""
        vocab = model.encoder(self.modality).vocab
        if vocab is None:
            raise ValueError(f"found {self.modality}, which is made of vectors; Denoising is for ids. Take Flow or Masked")
        if stray := set(self.draw.names) - set(self.denoisers):
            raise ValueError(f"shares name {', '.join(sorted(stray))}; the denoisers are {', '.join(self.denoisers)}")
        if self.into and self.places == "blanks":
            raise ValueError(f"found places: blanks and into: {self.into}; spans can stand at their marks in one stack only")
        if self.into in self.needs:
            raise ValueError(f"found into: {self.into}, which is read from the data; name another encoder for the source, or none")
        if self.into and model.encoder(self.into).vocab != vocab:
            raise ValueError(
                f"{self.into} has {model.encoder(self.into).vocab} ids and {self.modality} {vocab}; expected the same ids: give "
                "both encoders one tokenizer and equally many `extra`"
            )
        check_context(model, self.modality, self.seen[1:])
        if model.fusion is not None and not model.fusion.keeps_order:
            raise ValueError(
                f"{type(model.fusion).__name__} mixes in no order, so nothing can be hidden behind it; take JointTokens"
            )
        if self.likelihood.anchor or self.likelihood.soft or self.likelihood.readers:
            raise ValueError("found anchor, soft or labels in the likelihood of Denoising; they belong to Causal. Leave them out")

    def allotted(self, model: Model) -> Ids:
        """Which of the reader's extra ids are marks: those behind the mode tokens."""
        encoder = model.encoder(self.modality)
        extras = encoder.reader.extras
        modes = 1 + max((mode for mode in self.modes if mode is not None), default=-1)
        length = encoder.blank().position.shape[1] if extras else 1
        marks = max(denoiser.marks(length) for denoiser in self.denoisers.values())
        if len(extras) < modes + marks:
            raise ValueError(
                f"found {len(extras)} extra ids of {self.modality}; expected {modes} for modes and at least {marks} for marks of "
                f"what is hidden in documents of {length} tokens. Set `extra` on its encoder"
            )
        return Ids(extras.start if extras else int(encoder.vocab or 0), extras[modes:])

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds "answer", the right ids (B, M) where they are "asked" (B, M), and "denoiser", its number for each sample (S,)."""
        whole = concat([batch[self.modality]])._replace(order=None)
        end = whole._replace(valid=ends(whole, self.end))
        seed, progress = random.fold(batch["seed"], "denoising"), batch.get("progress", 0.0)
        turns = self.draw.choose([*self.denoisers], batch | {"seed": seed})
        which = torch.stack([chosen for chosen in turns.values() if chosen is not None]).long().argmax(0)
        own = torch.where(whole.real() & ~end.real(), which[whole.sample()], -1)
        pairs = [make(whole._replace(valid=own == k), seed, self.ids, progress) for k, make in enumerate(self.denoisers.values())]
        over = torch.tensor([make.ended for make in self.denoisers.values()], device=which.device)[which]
        closing = end._replace(valid=end.real() & over[end.sample()])
        source = concat([self.opening(whole, which), *(pair.source for pair in pairs), closing])
        target = concat([*(pair.target for pair in pairs), end])
        return batch | self.posed(batch, source, target) | {"denoiser": which}

    def opening(self, whole: Tokens, which: Tensor) -> Tokens:
        """The mode token of each document, at its first place. which: (S,) number of the denoiser."""
        ids = which.new_tensor([-1 if mode is None else self.extras[mode] for mode in self.modes])[which][whole.sample()]
        return whole._replace(x=ids, valid=whole.real() & (whole.place() == 0) & (ids >= 0))

    def posed(self, batch: Batch, source: Tokens, target: Tokens) -> Batch:
        """What the encoders get: the source with order 0, the target shifted and with orders that count up."""
        others = {k: t._replace(order=torch.zeros_like(t.place())) for k, t in part(batch, self.needs[1:]).items()}
        before, behind = (t._replace(order=torch.full_like(t.place(), n)) for n, t in enumerate((source, target)))
        if self.into:
            others[self.into], parts = counted(before), [behind]
        else:
            parts = [before, behind]
        asks, answer = concat([*parts[:-1], shift(behind, self.start_id)]), concat(parts)
        asked = self.likelihood.keeps(answer) & (orders(answer) > 0)
        asks = counted(asks)
        if self.places == "blanks":
            asks = asks._replace(position=blanks(asks, self.ids.marks))
        return others | {self.modality: asks, "answer": answer.x, "asked": asked}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"denoising": batch["asked"].sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return self.score(model, self.states(model, batch), batch)

    def states(self, model: Model, batch: Batch) -> Tensor:
        """The vectors (B, M, D) that answer at every place, on what `task` returned."""
        y = model(model.embed(part(batch, self.seen)), True)[self.modality].x
        return y[:, : batch["asked"].shape[1]]  # registers and other appended tokens answer nothing

    def score(self, model: Model, states: Tensor, batch: Batch) -> dict[str, Term]:
        """The term, given the vectors that answer."""
        answer, asked = batch[self.modality]._replace(x=batch["answer"]), batch["asked"]
        cost = self.likelihood.score(model.encoder(self.modality).unembed, states, answer, asked, batch)
        return {"denoising": Term(cost.sum(), asked.sum(), metrics=self.told(batch, cost.detach()))}

    def told(self, batch: Batch, cost: Tensor) -> dict[str, Tensor]:
        """The mean cost of each denoiser's targets on this rank, where it has any; nothing of one alone."""
        if len(self.denoisers) == 1:
            return {}
        which, asked = batch["denoiser"][batch[self.modality].sample()], batch["asked"]
        number = which[asked].bincount(minlength=len(self.denoisers))
        total = cost.new_zeros(len(number)).index_add(0, which[asked], cost[asked])
        return {name: total[k] / number[k] for k, name in enumerate(self.denoisers) if number[k]}


def ends(t: Tokens, end: int | None) -> Tensor:
    """(B, N) True = the last token of its document, if it is the end mark. The real tokens of documents must be unbroken runs."""
    last = t.real() & ~F.pad(t.real() & (t.place() > 0), (0, 1))[:, 1:]
    return last & (t.x == end) if end is not None else torch.zeros_like(last)


def counted(t: Tokens) -> Tokens:
    """Places count up from 0 along coordinate 0 and are 0 along the others; orders above 0 count up too."""
    place = t.place()
    position = torch.zeros_like(t.position)
    position[..., 0] = place.to(position.dtype)
    return t._replace(position=position, order=torch.where(orders(t) > 0, 1 + place, 0))


def blanks(t: Tokens, marks: range) -> Tensor:
    """(B, M, 2) coordinates: of sources their places and 0, of a span in the target the place of its mark there, and 1, 2, ...

    t.x: (B, M) sources and behind each, with orders above 0, its target. What follows no mark stands where it is.
    """
    place, target, column = t.place(), orders(t) > 0, torch.arange(t.x.shape[1], device=t.x.device)
    mark = t.real() & (t.x >= marks.start) & (t.x < marks.stop)
    seat = t.sample() * len(marks) + torch.where(mark, t.x - marks.start, 0)
    seen, asked = mark & ~target, mark & target
    table = place.new_zeros(int(seat.max()) + 1).index_put((seat[seen],), place[seen])
    last = beginning(asked | (place == 0))
    within = target & asked.gather(1, last)
    first = torch.where(within, table[seat].gather(1, last), place)
    return torch.stack([first, torch.where(within, column - last + 1, 0)], -1).to(t.position.dtype)
