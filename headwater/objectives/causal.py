"""Autoregressive prediction in any modality: what comes next, given what came before.

The input of each place is the token before it (a start token first), so that place t, which carries the order of step t,
sees everything of the other modalities up to t and is asked for step t. For ids this is the language model's loss
(cross entropy); for vectors the next one is regressed (as AIM does for patches, El-Nouby et al. 2024, arXiv:2401.08541).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.model import Model
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.objective import Batch, Objective, Term, check_context, part, squared_error
from headwater.teacher import Teacher
from headwater.tokens import Tokens


def shift(t: Tokens, start: int | None) -> Tokens:
    """Each place holds the value before it; the first place of a document holds `start`, or zeros for vectors."""
    before = F.pad(t.x, (1, 0) if t.x.ndim == 2 else (0, 0, 1, 0))[:, :-1]
    first = t.place() == 0
    first = first if t.x.ndim == 2 else first[..., None]
    return t._replace(x=torch.where(first, torch.zeros_like(before) if start is None else start, before))


def one_by_one(t: Tokens, step: int) -> Tokens:
    """Makes orders `step` apart and counts the tokens of equal order up within, so that no two see each other.

    step: more than the tokens of any span. Needs `order` to rise along the row.
    """
    order = t.place() if t.order is None else t.order
    span = t._replace(document=(t.sample() << 32) + order)
    return t._replace(order=order * step + span.place())


class Causal(Objective):
    """Hides the future of one modality.

    Args:
        model: its encoder's `unembed` answers, so what is learned here can generate.
        modality: what is predicted, step by step.
        prefix: modalities that are known from the beginning and see themselves in both directions (an instruction, a picture).
        context: modalities that unfold in step with it, by their `order` (frames beside actions).
        likelihood: what a step of ids costs, given the probability of the right one; None = -log p of every step.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        prefix: list[str] | None = None,
        context: list[str] | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        encoder = model.encoder(modality)
        self.modality, self.prefix, self.classes = modality, tuple(prefix or ()), encoder.vocab
        if likelihood is not None and encoder.vocab is None:
            raise ValueError(f"found a likelihood for {modality}, whose steps are vectors; expected ids. Leave it out")
        self.likelihood = likelihood or Likelihood()
        self.readers = self.likelihood.readers
        self.seen = (modality, *self.prefix, *(context or ()))
        self.needs = (*self.seen, *self.readers)
        check_context(model, modality, self.seen[1:])
        if model.fusion is not None and not model.fusion.keeps_order:
            raise ValueError(
                f"{type(model.fusion).__name__} mixes in no order, so nothing can be hidden behind it; take JointTokens"
            )
        self.ids, self.start_id = encoder.vocab is not None, encoder.start
        self.reference = self.likelihood.teacher(model.only(self.seen, fusion=True))

    def start(self, model: Model) -> None:
        if self.reference is not None and self.likelihood.reference is None:
            self.reference.copy(model.only(self.seen, fusion=True))

    def task(self, batch: Batch, hints: None = None) -> Batch:
        raw = batch[self.modality]
        others = {k: batch[k] for k in self.seen[1:]}
        if raw.order is not None:  # patches of a frame share one order; as answers they come one by one
            step = raw.position.shape[1] + 1
            others = {k: t._replace(order=step * (t.place() if t.order is None else t.order)) for k, t in others.items()}
            raw = one_by_one(raw, step)
        for k in self.prefix:
            others[k] = others[k]._replace(order=torch.zeros_like(others[k].place()))
        asked = self.likelihood.keeps(raw) if self.ids else raw.real()
        return {**batch, **others, self.modality: shift(raw, self.start_id), "answer": raw.x, "asked": asked}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("causal", "anchor") if self.likelihood.anchor else ("causal",), batch["asked"].sum())

    def predict(self, model: Model | Teacher, batch: Batch) -> Tensor:
        """What the model answers at every place, on what `task` returned: logits (B, N, V) or values (B, N, features)."""
        y = model(model.embed(part(batch, self.seen)), True)
        length = batch[self.modality].position.shape[1]  # registers and other appended tokens answer nothing
        return model.encoder(self.modality).unembed(y[self.modality].x[:, :length])

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        predicted, asked = self.predict(model, batch), batch["asked"]
        if not self.ids:
            return {"causal": Term((squared_error(predicted.float(), batch["answer"]) * asked).sum(), asked.sum())}
        with torch.no_grad():
            reference = None if self.reference is None else self.predict(self.reference, batch)
        answer = batch[self.modality]._replace(x=batch["answer"])
        terms = {"causal": Term((self.likelihood.cost(predicted, answer, batch, reference) * asked).sum(), asked.sum())}
        if self.likelihood.anchor and reference is not None:
            away, weight = self.likelihood.anchor(predicted, reference), self.likelihood.anchored(batch.get("progress", 0.0))
            terms["anchor"] = Term((away * asked).sum(), asked.sum(), weight)
        return terms
