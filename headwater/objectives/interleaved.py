"""Next-step prediction over documents in which several modalities take turns: one causal pass, every modality answers.

`headwater.turns` says what every place holds. Ids are scored by likelihood (Chameleon, Chameleon Team 2024, arXiv:2405.09818,
with pictures as ids), vectors are regressed (Emu, Sun et al. 2023, arXiv:2307.05222, https://github.com/baaivision/Emu). Which
modality comes next is not asked: a text tells by its end mark that it is over, and each modality has a head of its own, so that
no grammar is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.objective import Batch, Objective, Term, check_context, part, squared_error
from headwater.turns import opened, turns


class Interleaved(Objective):
    """Hides the future of documents, in all of their modalities.

    Args:
        model: the encoders' `unembed` answer, so what is learned here can generate; its fusion must join all modalities by
            `order`, as JointTokens does.
        modalities: what documents are made of. Where tokens have no `order` (pairs that are no documents), all of the first come
            first, then those of the second.
        flip: share of the samples without an order that come the other way round, so that one model learns both directions.
        likelihood: what ids cost; None = -log p of every one. Rewards of segments weigh those (`Rewarded`, rule "linear").
        weights: modality -> factor on its loss.
    """

    def __init__(
        self,
        model: Model,
        modalities: Sequence[str] = ("image", "text"),
        flip: float = 0.0,
        likelihood: Likelihood | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.modalities, self.flip, self.weights = tuple(modalities), flip, weights or {}
        self.likelihood = likelihood or Likelihood()
        self.readers = self.likelihood.readers
        self.needs = (*self.modalities, *self.readers)
        self._check(model)
        self.starts = {name: model.encoder(name).start for name in self.modalities}

    def _check(self, model: Model) -> None:
        if len(set(self.modalities)) < 2:
            raise ValueError(f"found modalities {list(self.modalities)}; expected two or more that take turns, or Causal for one")
        check_context(model, self.modalities[0], self.modalities[1:])
        if model.fusion is not None and (not model.fusion.keeps_order or model.fusion.last is not None):
            raise ValueError(
                f"{type(model.fusion).__name__} does not join all modalities by their order, so what comes later would be seen "
                "or what came before would not; take JointTokens"
            )
        if stray := set(self.weights) - set(self.modalities):
            raise ValueError(f"weights name {', '.join(sorted(stray))}; what is predicted is {', '.join(self.modalities)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"found flip {self.flip}; expected a share from 0 to 1")
        if self.likelihood.anchor or self.likelihood.soft:
            raise ValueError("found anchor or soft in the likelihood of Interleaved; they are for Causal. Leave them out")

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds `answers`: modality -> Tokens of what its places are asked for, valid where they are asked."""
        parts = part(batch, self.modalities)
        back = random.uniform(batch["seed"], (), "interleaved/flip") < self.flip if self.flip else None
        places, answers = {}, {}
        for (name, t), at in zip(parts.items(), turns([*parts.values()], back), strict=True):
            asked = self.likelihood.keeps(t) if t.x.ndim == 2 else t.real()
            places[name], answers[name] = opened(t, at, asked, self.starts[name])
        return {**batch, **places, "answers": answers}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {f"interleaved/{name}": answers.real().sum() for name, answers in batch["answers"].items()}

    def states(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """The vectors (B, N, D) that answer at every place, on what `task` returned."""
        y = model(model.embed(part(batch, self.modalities)), True)
        return {name: y[name].x[:, : batch[name].position.shape[1]] for name in self.modalities}  # registers answer nothing

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return self.score(model, self.states(model, batch), batch)

    def score(self, model: Model, states: dict[str, Tensor], batch: Batch) -> dict[str, Term]:
        """The terms, given the vectors that answer."""
        terms = {}
        for name, answers in batch["answers"].items():
            asked, unembed = answers.real(), model.encoder(name).unembed
            if answers.x.ndim == 2:
                cost = self.likelihood.score(unembed, states[name], answers, asked, batch)
            else:
                cost = squared_error(unembed(states[name]).float(), answers.x) * asked
            terms[f"interleaved/{name}"] = Term(cost.sum(), asked.sum(), self.weights.get(name, 1.0))
        return terms
