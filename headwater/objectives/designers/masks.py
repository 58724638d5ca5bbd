"""Learned masks: scores of tokens decide which of them `Masked` hides.

The choice is a race: token i comes first at a time drawn from the exponential distribution of rate e^score_i, and of each sample
the first k are hidden. That is the top k of scores with Gumbel noise (Kool et al. 2019, arXiv:1903.06059). It has no derivative, so
the value gets its gradient by the probabilities with which tokens are hidden, as if the error at a place did not depend on which
others are hidden with it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import ZERO, Rule
from headwater.model import Model
from headwater.objectives.designers.designer import Designer
from headwater.objectives.masked import Masked
from headwater.objectives.masks.policies import Policy, ascending, lengths
from headwater.objectives.objective import Batch, Objective, Term, at, wide
from headwater.position import sincos
from headwater.tokens import Tokens

ROUNDS = 25  # of Newton's method, from below; scores that are 6 apart need about ten


class Scored(Policy):
    """Those with the largest scores, which a designer hands over: MaskScores."""

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        if score is None:
            raise ValueError("Scored found no scores; put VPretraining with the designer MaskScores around this objective")
        return -score


class Seen(NamedTuple):
    """hints: of the objective. read: what scores are made of, (B, N) ids or (B, N, D)."""

    hints: Any
    read: Tensor


class MaskScores(Designer):
    """A small network scores every token of one modality; as many as the objective's ratio says are hidden, most of them of high
    score.

    Args:
        model: gives widths.
        inner: a Masked objective whose policy for the modality is Scored.
        modality: one that is hidden; None = the first of them.
        hidden: width of the network, which reads a token and its coordinates.
        bound: scores lie between -bound and bound, so that no choice is ever certain.
        reads: "values" = the tokens as they are. "learner" = what the learner makes of the whole signal, without gradient; costs
            a forward pass.
        ask: for the value. "every" = every token is asked for once or more, behind ceil(1 / ratio) masks that go round by the
            scores, and its error counts by the probability of being hidden. "hidden" = those that the learner will be asked
            for, which count 1 and have the gradient of log p: one pass, and a rougher estimate.
    """

    def __init__(
        self,
        model: Model,
        inner: Objective,
        modality: str | None = None,
        hidden: int = 32,
        bound: float = 3.0,
        reads: Literal["values", "learner"] = "values",
        ask: Literal["every", "hidden"] = "every",
    ) -> None:
        super().__init__()
        if not isinstance(inner, Masked):
            raise ValueError(f"found masks for {type(inner).__name__}; expected Masked, with policy: Scored")
        self.modality = modality or inner.hides[0]
        if self.modality not in inner.hides or not isinstance(inner.policy[self.modality], Scored):
            raise ValueError(f"found scores for {self.modality}; expected one of {', '.join(inner.hides)} whose policy is Scored")
        if at(inner.ratio[self.modality], 0.0) >= 1:
            raise ValueError(f"all of {self.modality} is hidden, so that there is nothing to choose; set a ratio below 1")
        if bound <= 0 or hidden < 2:
            raise ValueError(f"found bound={bound} and hidden={hidden}; expected a bound above 0 and two or more numbers")
        encoder = model.encoder(self.modality)
        self.bound, self.reads, self.every = bound, reads, ask == "every"
        if reads == "values" and encoder.vocab is not None:
            self.enter: nn.Module = nn.Embedding(encoder.vocab, hidden)
        else:
            self.enter = nn.Linear(model.width(self.modality) if reads == "learner" else encoder.features, hidden)
        self.net = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1, bias=False))

    def init_rules(self) -> dict[str, Rule]:
        """Before it has learned every token is as likely as any other."""
        return {"net.2.weight": ZERO}

    def look(self, inner: Any, model: Model, batch: Batch, ahead: bool) -> Seen:
        hints, t = inner.look(model, batch), batch[self.modality]
        if self.reads == "values":
            return Seen(hints, t.x)
        whole = model(model.embed({name: batch[name] for name in inner.signals}))[self.modality]
        return Seen(hints, whole.x[:, : t.position.shape[1]])

    def scores(self, t: Tokens, read: Tensor) -> Tensor:
        """(B, N), between -bound and bound."""
        if read.is_floating_point():
            read = read.nan_to_num().to(next(self.parameters()).dtype)
        x = self.enter(read)
        x = x + sincos(t.position, x.shape[-1]).to(x.dtype)
        return self.bound * torch.tanh(wide(self.net(x)[..., 0]) / self.bound)

    def design(self, inner: Any, batch: Batch, hints: Seen, ahead: bool) -> Batch:
        name, t, seed = self.modality, batch[self.modality], batch["seed"]
        score = self.scores(t, hints.read)
        drawn = score.detach() + random.gumbel(random.token_seed(seed, t), (), f"mask/{name}").to(score.dtype)

        def hiding(by: Tensor) -> Batch:
            return inner.task(batch, {**hints.hints, "scores": {**hints.hints["scores"], name: by}})

        task = hiding(drawn)
        if not ahead:
            return task
        number = lengths(t._replace(valid=task["hidden"][name]), len(seed))
        likely = inclusion(t, score, number)
        if not self.every:
            return {**task, "worth": {name: likely / likely.detach().clamp(min=1e-30)}}
        order, rank = ascending(t, -drawn)
        rank = torch.empty_like(rank).scatter_(1, order, rank)
        length = lengths(t, len(seed)).clamp(min=1)
        count = math.ceil(1 / at(inner.ratio[name], batch.get("progress", 0.0)))  # the same on all ranks
        others = [hiding(-((rank - turn * number[t.sample()]) % length[t.sample()])) for turn in range(1, count)]
        times = torch.stack([its["hidden"][name] for its in (task, *others)]).sum(0)
        worth = {name: likely / times.clamp(min=1)}
        return {**task, "worth": worth, "turns": [{**its, "worth": worth} for its in others]}

    def ask(self, inner: Any, model: Model, task: Batch) -> dict[str, Term]:
        terms, name = inner(model, task), inner.term_of(self.modality)
        more = [inner(model, its)[name].total for its in task.get("turns", ())]
        return {**terms, name: terms[name]._replace(total=torch.stack([terms[name].total, *more]).sum())}


def inclusion(t: Tokens, score: Tensor, number: Tensor) -> Tensor:
    """How likely each token is among the first `number` (S,) of its sample: 1 - exp(-time e^score), (B, N).

    The time is when as many are expected to have come, so that the sum over a sample is `number`: right for many tokens, a few
    hundredths off for ten. The last step of Newton's method gives it its derivative: what one token gains others lose.
    """
    real, sample = t.real(), t.sample()
    rate = torch.where(real, score.exp(), 0.0)
    number = number.to(rate.dtype)

    def summed(x: Tensor) -> Tensor:
        return x.new_zeros(len(number)).index_add(0, sample.flatten(), x.flatten())

    def step(time: Tensor) -> Tensor:
        left = torch.exp(-rate * time[sample])
        return time + (number - summed(1 - left)) / summed((rate * left).detach()).clamp(min=1e-30)

    with torch.no_grad():
        time = number / summed(rate).clamp(min=1e-30)  # not later than it will be
        for _ in range(ROUNDS):
            time = step(time)
    return 1 - torch.exp(-rate * step(time)[sample])
