"""Autoregressive prediction in any modality: what comes next, given what came before.

The input of each place is the token before it (a start token first), so that place t, which carries the order of step t,
sees everything of the other modalities up to t and is asked for step t. For ids this is the language model's loss
(cross entropy); for vectors the next one is regressed (as AIM does for patches, El-Nouby et al. 2024, arXiv:2401.08541).
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.model import Model
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.objective import Batch, Objective, Term, check_context, cross_entropy, part, squared_error
from headwater.sequence import shift, unfolding
from headwater.teacher import Teacher


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
        self.modality, self.classes = modality, encoder.vocab
        self.prefix, self.context = tuple(prefix or ()), tuple(context or ())
        if likelihood is not None and encoder.vocab is None:
            raise ValueError(f"found a likelihood for {modality}, whose steps are vectors; expected ids. Leave it out")
        self.likelihood = likelihood or Likelihood()
        self.readers = self.likelihood.readers
        self.seen = (modality, *self.prefix, *self.context)
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
        raw, others = unfolding(batch[self.modality], part(batch, self.prefix), part(batch, self.context))
        asked = self.likelihood.keeps(raw) if self.ids else raw.real()
        return {**batch, **others, self.modality: shift(raw, self.start_id), "answer": raw.x, "asked": asked}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("causal", "anchor") if self.likelihood.anchor else ("causal",), batch["asked"].sum())

    def states(self, model: Model | Teacher, batch: Batch) -> Tensor:
        """The vectors (B, N, D) that answer at every place, on what `task` returned."""
        y = model(model.embed(part(batch, self.seen)), True)[self.modality].x
        return y[:, : batch[self.modality].position.shape[1]]  # registers and other appended tokens answer nothing

    def predict(self, model: Model | Teacher, batch: Batch) -> Tensor:
        """What the model answers at every place: logits (B, N, V) or values (B, N, features)."""
        return model.encoder(self.modality).unembed(self.states(model, batch))

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return self.score(model, self.states(model, batch), batch)

    def score(self, model: Model, states: Tensor, batch: Batch) -> dict[str, Term]:
        """The terms, given the vectors that answer."""
        unembed, asked = model.encoder(self.modality).unembed, batch["asked"]
        if not self.ids:
            return {"causal": Term((squared_error(unembed(states).float(), batch["answer"]) * asked).sum(), asked.sum())}
        answer = batch[self.modality]._replace(x=batch["answer"])
        if self.reference is not None:
            return self._beside(unembed(states), batch)
        return {"causal": Term(self.likelihood.score(unembed, states, answer, asked, batch).sum(), asked.sum())}

    def _beside(self, logits: Tensor, batch: Batch) -> dict[str, Term]:
        """The terms where the reference answers too, for which both need their logits."""
        answer, asked, likelihood = batch[self.modality]._replace(x=batch["answer"]), batch["asked"], self.likelihood
        with torch.no_grad():
            reference = self.predict(self.reference, batch)  # type: ignore[arg-type]
        cost = likelihood.cost(-cross_entropy(logits, answer.x), answer, batch)
        if likelihood.soft:
            cost = likelihood.soft(cost, logits, reference)
        terms = {"causal": Term((cost * asked).sum(), asked.sum())}
        if likelihood.anchor:
            weight = likelihood.anchored(batch.get("progress", 0.0))
            terms["anchor"] = Term((likelihood.anchor(logits, reference) * asked).sum(), asked.sum(), weight)
        return terms
