"""Distillation of answers: next-token prediction that listens to what teachers would have answered.

(1 - w) CE + w T^2 KL(teacher^T || student^T) (Hinton et al. 2015, arXiv:1503.02531), with truncated teachers (Peng et al. 2024,
arXiv:2410.16215), ensembles of them, weights that fade (Rawat et al. 2024, arXiv:2410.18779), and plain cross entropy where a
teacher is certain (Goyal et al. 2025, arXiv:2509.01649). A teacher may know more than the student: a hint, a picture, a longer
prompt (context distillation, Askell et al. 2021, arXiv:2112.00861).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.guide import Guide, Source
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, cross_entropy, wide
from headwater.objectives.wrapped import Wrapped

Match = Literal["kl", "cross_entropy", "squared"]


def soften(logits: Tensor, temperature: float = 1.0, top: int | None = None, mass: float | None = None) -> Tensor:
    """Probabilities (..., V) at a temperature; of the `top` likeliest, or of the fewest that hold `mass`, renormalised."""
    p = (wide(logits) / temperature).softmax(-1)
    if top is None and mass is None:
        return p
    sorted_p, index = p.sort(dim=-1, descending=True)
    before = sorted_p.cumsum(-1) - sorted_p  # the mass of likelier ones
    kept = torch.ones_like(sorted_p, dtype=torch.bool) if mass is None else before < mass
    if top is not None:
        kept[..., top:] = False
    p = torch.zeros_like(p).scatter(-1, index, sorted_p * kept)
    return p / p.sum(-1, keepdim=True)


def entropy(p: Tensor) -> Tensor:
    """In nats: (..., V) -> (...)."""
    return -torch.xlogy(p, p).sum(-1)


def divergence(logits: Tensor, p: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || softmax(logits / T)): (..., V), (..., V) -> (...). T^2 keeps the size of gradients."""
    q = (wide(logits) / temperature).log_softmax(-1)
    return temperature**2 * (-(p * q).sum(-1) - entropy(p))


class Distilled(Wrapped):
    """Hides what `inner` hides, and scores answers by the truth and by those of teachers, who are asked the same.

    Several teachers answer by the mean of their probabilities. Where the weight is 0 no teacher is asked.

    Args:
        model: the student.
        inner: predicts ids by the model's own head.
        teachers: "start", "average", an encoder or a model, see headwater.objectives.guide; one or several.
        guide: what teachers are asked instead of `inner`, where they know more: the same ids, with other modalities beside them.
        weight: w, 0 = only the truth, 1 = only the teachers; a schedule may fade it.
        temperature: T.
        match: "kl", "cross_entropy" (the same without the teachers' entropy), or "squared" differences of logits.
        top, mass: truncate every teacher to so many ids, or to so much probability.
        certain: nats; where the entropy of the teachers' answer at T is lower, only the truth counts.
        momentum: of teachers that are averages.
    """

    def __init__(
        self,
        model: Model,
        inner: Callable[[Model], Causal],
        teachers: list[Source] | Source = "average",
        guide: Callable[[Model], Causal] | None = None,
        weight: float | Schedule = 0.5,
        temperature: float = 1.0,
        match: Match = "kl",
        top: int | None = None,
        mass: float | None = None,
        certain: float = 0.0,
        momentum: float | Schedule = 0.996,
    ) -> None:
        super().__init__(model, inner)
        asked: Any = guide(model) if guide else self.inner
        for part in (self.inner, asked):
            if not isinstance(part, Causal) or not part.ids or part.reference is not None:
                raise ValueError(f"found {type(part).__name__} inside; expected Causal on ids, without a reference of its own")
        if not callable(weight) and not 0 <= weight <= 1:
            raise ValueError(f"found weight {weight}; expected 0 (only the truth) to 1 (only the teachers)")
        if temperature <= 0 or (top is not None and top < 1) or (mass is not None and not 0 < mass <= 1):
            raise ValueError(f"found temperature {temperature}, top {top}, mass {mass}; expected above 0, at least 1, in (0, 1]")
        if match == "squared" and (top is not None or mass is not None):
            raise ValueError("found match squared with top or mass; logits that were left out have no difference to square")
        self.guide = asked if guide else None
        self.needs = tuple(dict.fromkeys((*self.inner.needs, *asked.needs)))
        sources = teachers if isinstance(teachers, list) else [teachers]
        self.teachers: Any = nn.ModuleList(Guide(model, source, asked.seen, momentum, fusion=True) for source in sources)
        vocab = [t.encoder(asked.modality).vocab for t in (model, *self.teachers)]
        if len(set(vocab)) > 1:
            raise ValueError(f"found vocabularies of {vocab}, the student's first; expected teachers with the same tokenizer")
        self.weight, self.temperature, self.match, self.top, self.mass = weight, temperature, match, top, mass
        self.certain = certain

    @property
    def parts(self) -> dict[str, Objective]:
        """What it asks is one thing, and needs all that the teachers are shown."""
        return {"objective": self}

    def start(self, model: Model) -> None:
        super().start(model)
        for teacher in self.teachers:
            teacher.start(model)

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        hidden = self.inner.task(batch, hints)
        return hidden if self.guide is None else {**hidden, "guide": self.guide.task(batch)}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"distilled": batch["asked"].sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        inner: Any = self.inner
        w = at(self.weight, batch.get("progress", 0.0))
        logits, asked, answer = inner.predict(model, batch), batch["asked"], batch["answer"]
        truth = inner.likelihood.cost(-cross_entropy(logits, answer), batch[inner.modality]._replace(x=answer), batch)
        if w == 0:
            return {"distilled": Term((truth * asked).sum(), asked.sum())}
        distance, doubt = self._listen(logits, batch)
        share = w * (doubt >= self.certain)
        total = (((1 - share) * truth + share * distance) * asked).sum()
        number = asked.sum()
        metrics = {"distance": (distance.detach() * asked).sum() / number, "entropy": (doubt * asked).sum() / number}
        return {"distilled": Term(total, number, metrics=metrics)}

    def _listen(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """How far the student's logits (B, N, V) are from the teachers' answers, and how uncertain those are; both (B, N)."""
        inner: Any = self.guide or self.inner
        with torch.no_grad():
            said = [inner.predict(teacher.model, batch.get("guide", batch)) for teacher in self.teachers]
            p = torch.stack([soften(s, self.temperature, self.top, self.mass) for s in said]).mean(0)
            doubt = entropy(p)
        if self.match == "squared":
            return (wide(logits) - torch.stack(said).mean(0)).square().mean(-1), doubt
        distance = divergence(logits, p, self.temperature)
        return distance + self.temperature**2 * doubt if self.match == "cross_entropy" else distance, doubt

    def after_step(self, model: Model, progress: float) -> None:
        super().after_step(model, progress)
        for teacher in self.teachers:
            teacher.after_step(model, progress)
