"""Words by their likelihood and pictures by flow, in one sequence under one set of weights.

Transfusion (Zhou et al. 2024, arXiv:2408.11039): words see what comes before them, a picture sees all of itself and what comes
before it, and both losses come from the same forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.flow import Flow, Times
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.objective import Batch, Objective, Term, part
from headwater.sequence import behind, orders
from headwater.turns import opened, turns


class Cleaner(Times):
    """Times of which those of samples that begin with the picture are scaled down, so that words have something to see.

    Args:
        times: of all others.
        first: share of the samples that begin with the picture.
        most: the largest time of these.
    """

    def __init__(self, times: Times, first: float, most: float) -> None:
        self.times, self.first, self.most = times, first, most

    def __call__(self, seed: Tensor, name: str) -> Tensor:
        time = self.times(seed, name)
        return torch.where(turned(seed, self.first), self.most * time, time)


def turned(seed: Tensor, first: float) -> Tensor:
    """Seeds of samples (...) -> (...) True = begins with the picture."""
    return random.uniform(seed, (), "transfusion/first") < first


class Transfusion(Objective):
    """Predicts ids step by step and denoises vectors, in one pass; which of them comes first is drawn for every sample.

    Ids in front: they never see the vectors, and the vectors see them. Vectors in front, with less noise: the ids see them. Use
    encoders with `Trunk(depth=0)` and a deep JointTokens for one set of weights, and `Dropped` for guidance. To generate vectors
    behind ids take `layout="interleaved"`; ids behind vectors are generated as after `Causal`.

    Args:
        model: its fusion keeps order.
        ids: the modality of ids.
        vectors: the modality that is denoised; the model's process says how.
        first: share of the samples that begin with the vectors (0.2 in the paper's pairs).
        most: the largest time of these, 0 = the signal to 1 = noise.
        times: of all others; None = Times().
        weight: of the flow beside the likelihood (5 in the paper).
        likelihood: of the ids.
    """

    def __init__(
        self,
        model: Model,
        ids: str = "text",
        vectors: str = "image",
        first: float = 0.2,
        most: float = 0.5,
        times: Times | None = None,
        weight: float = 5.0,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= first <= 1 or not 0 < most <= 1:
            raise ValueError(f"found first {first} and most {most}; expected a share from 0 to 1, and a time above 0, up to 1")
        if model.encoder(ids).vocab is None:
            raise ValueError(f"found {ids} as ids, which is made of vectors; expected ids there and vectors in `vectors`")
        self.next: Any = Causal(model, ids, [vectors], likelihood=likelihood)
        self.flow: Any = Flow(model, vectors, past=[ids], times=Cleaner(times or Times(), first, most))
        if self.next.reference is not None or self.flow.process.told:
            raise ValueError(
                "found a likelihood with a reference, or a process that is told something; here each model answers once"
            )
        self.ids, self.vectors, self.first, self.weight = ids, vectors, first, weight
        self.needs = tuple(dict.fromkeys((*self.next.needs, *self.flow.needs)))

    def task(self, batch: Batch, hints: None = None) -> Batch:
        raw, noisy = batch[self.ids], self.flow.task(batch)
        late = behind(noisy[self.vectors])
        front = turned(batch["seed"], self.first)[late.sample()]
        placed = late._replace(order=torch.where(front, 0, orders(late)))
        (at,) = turns([raw])
        words, answers = opened(raw, at, self.next.likelihood.keeps(raw), self.next.start_id)
        return {**noisy, self.vectors: placed, self.ids: words, "answer": answers.x, "asked": answers.real()}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {**self.next.numbers(batch), **self.flow.numbers(batch)}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        parts, condition = model.at_time(model.embed(part(batch, (self.ids, self.vectors))), self.vectors, batch["time"])
        y = {name: t.x[:, : batch[name].position.shape[1]] for name, t in model(parts, True, condition).items()}
        flow = self.flow.score(model, y[self.vectors], batch)
        weighted = {name: term._replace(weight=self.weight * term.weight) for name, term in flow.items()}
        return self.next.score(model, y[self.ids], batch) | weighted
