"""Replaced tokens: something puts plausible ids in place of some, and the model says of every token whether it is original.

ELECTRA (Clark et al. 2020, arXiv:2003.10555; https://github.com/google-research/electra). Cheap replacements, places that are
scored, and the original as the question: Di Liello 2023, arXiv:2309.08272, and Di Liello et al. 2021, arXiv:2104.09694.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed, random
from headwater.init import OUTPUT, TABLE, ZERO, Rule
from headwater.model import Model
from headwater.objectives.masks.policies import Policy, Uniform, indices
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, check_context, cross_entropy, part
from headwater.tokens import Tokens
from headwater.trunk import Trunk


def pick(weight: Tensor, draw: Tensor) -> Tensor:
    """Ids (...) by weights (..., V), or (V,) the same for all, and draws (...) in [0, 1): where the sum of weights passes the draw.

    One draw per token, where Gumbel noise would take V.
    """
    reach = weight.double().cumsum(-1)
    found = torch.searchsorted(reach, draw[..., None] * reach[..., -1:], right=True)[..., 0]
    return found.clamp(max=weight.shape[-1] - 1)


def area(score: Tensor, positive: Tensor, real: Tensor) -> Tensor:
    """How often, among the real ones, a score that is positive lies above one that is not: all (T,); 0.5 without both.

    The area under the receiver operating characteristic, by the sum of ranks.
    """
    order = torch.where(real, score, -torch.inf).argsort()
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device)) - (~real).sum()
    yes, no = (positive & real).sum(), (~positive & real).sum()
    above = (rank * (positive & real)).sum() - yes * (yes - 1) // 2
    return torch.where(yes * no > 0, above / (yes * no).clamp(min=1), 0.5)


def told(logit: Tensor, replaced: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed binary cross entropy of (B, K) answers to "was it replaced?", and how well the two kinds are told apart."""
    logit = logit.float()
    total = (F.binary_cross_entropy_with_logits(logit, replaced.float(), reduction="none") * real).sum()
    share = (replaced & real).sum() / real.sum().clamp(min=1)
    return total, {"replaced": share, "area": area(logit.detach().flatten(), replaced.flatten(), real.flatten())}


def restored(logits: Tensor, truth: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed cross entropy of (B, K, V) answers to "which id was it?", and how many are right."""
    right = ((logits.argmax(-1) == truth) & real).sum() / real.sum().clamp(min=1)
    return (cross_entropy(logits, truth) * real).sum(), {"right": right}


class Proposed(NamedTuple):
    """ids: (B, N), read where tokens are hidden. total: summed loss of what proposes, None where it does not learn."""

    ids: Tensor
    total: Tensor | None = None


class Generator(nn.Module):
    """Proposes ids. Subclasses take (model, modality) first and answer.

    learns: it has a loss of its own over the hidden tokens, the term "generator".
    """

    learns: bool = False

    def __init__(self, model: Model, modality: str) -> None:
        super().__init__()
        self.vocab = int(model.encoder(modality).vocab or 0)

    def forward(self, raw: Tokens, embedded: Tokens, hidden: Tensor, seed: Tensor) -> Proposed:
        """raw: (B, N) ids; embedded: (B, N, E) of the model's stem; hidden: (B, N); seed: (B, N), one per token."""
        raise NotImplementedError(f"{type(self).__name__} does not propose")

    def after_step(self) -> None:
        """Once per optimizer step."""


class SmallModel(Generator):
    """A masked language model of its own, a quarter to a half as wide as the model; it shares the model's embedding.

    Its answers are drawn, not the most likely taken, and no gradient goes through the draw.

    Args:
        model, modality: whose stem embeds.
        width, depth: of its trunk.
    """

    learns = True

    def __init__(self, model: Model, modality: str, width: int = 64, depth: int = 2) -> None:
        super().__init__(model, modality)
        embedded = model.encoder(modality).embedded
        self.mask = nn.Parameter(torch.randn(embedded) * 0.02)
        self.enter, self.trunk = nn.Linear(embedded, width), Trunk(width, depth)
        self.head = nn.Linear(width, self.vocab)

    def init_rules(self) -> dict[str, Rule]:
        return {"mask": TABLE, "head.weight": OUTPUT}

    def forward(self, raw: Tokens, embedded: Tokens, hidden: Tensor, seed: Tensor) -> Proposed:
        x = torch.where(hidden[..., None], self.mask.to(embedded.x.dtype), embedded.x)
        y = self.trunk(embedded._replace(x=self.enter(x)))
        places = indices(hidden)
        logits, target = self.head(y.take(places.column).x), raw.take(*places)
        draw = random.uniform(seed.gather(1, places.column), (), "generator")
        ids = raw.x.scatter(1, places.column, pick(logits.detach().float().softmax(-1), draw))
        return Proposed(ids, (cross_entropy(logits, target.x) * target.real()).sum())


class AnyId(Generator):
    """Any id, all alike."""

    def forward(self, raw: Tokens, embedded: Tokens, hidden: Tensor, seed: Tensor) -> Proposed:
        return Proposed((random.uniform(seed, (), "generator") * self.vocab).long())


class Unigram(Generator):
    """Ids as often as they came in the steps before this one, and each as if it had come once more."""

    count: Tensor
    now: Tensor

    def __init__(self, model: Model, modality: str) -> None:
        super().__init__(model, modality)
        self.register_buffer("count", torch.zeros(self.vocab, dtype=torch.int64))
        self.register_buffer("now", torch.zeros(self.vocab, dtype=torch.int64), persistent=False)

    def init_rules(self) -> dict[str, Rule]:
        return {"count": ZERO, "now": ZERO}

    def forward(self, raw: Tokens, embedded: Tokens, hidden: Tensor, seed: Tensor) -> Proposed:
        self.now.index_add_(0, raw.x.flatten(), raw.real().long().flatten())
        return Proposed(pick(self.count + 1, random.uniform(seed, (), "generator")))

    def after_step(self) -> None:
        self.count += distributed.total(self.now)
        self.now.zero_()


class Elsewhere(Generator):
    """A token from a drawn place of the same sample: true words at the wrong place."""

    def forward(self, raw: Tokens, embedded: Tokens, hidden: Tensor, seed: Tensor) -> Proposed:
        here, place = torch.arange(raw.x.numel(), device=raw.x.device).view(raw.x.shape), raw.place()
        first = here - place  # of the sample, in the batch as one row
        length = torch.zeros_like(here.flatten()).index_add(0, first.flatten(), raw.real().long().flatten())[first]
        other = first + (random.uniform(seed, (), "generator") * length).long()
        return Proposed(raw.x.flatten()[other])


class Replaced(Objective):
    """Replaces ids of one modality and asks the model about all of them.

    A replacement that happens to be the original counts as original.

    Args:
        model: its encoder, and fusion, tell what was replaced; this is what is kept.
        modality: made of ids.
        ratio: share of each document's tokens that may be replaced.
        policy: which tokens; None = Uniform().
        generator: what proposes: SmallModel, AnyId, Unigram or Elsewhere.
        ask: "replaced" = was it, a yes or no for every token; "original" = which id was it, by a head over the vocabulary and
            without a mask token in the input.
        over: score "all" tokens, or only those that were "hidden" from the generator.
        weight: of this loss beside the generator's; a schedule may switch it off during the run, or on.
        context: other modalities that may help, through the model's fusion.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        ratio: float | Schedule = 0.15,
        policy: Policy | None = None,
        generator: Callable[[Model, str], Generator] = SmallModel,
        ask: Literal["replaced", "original"] = "replaced",
        over: Literal["all", "hidden"] = "all",
        weight: float | Schedule = 50.0,
        context: list[str] | None = None,
    ) -> None:
        super().__init__()
        encoder, width = model.encoder(modality), model.width(modality)
        if encoder.vocab is None:
            raise ValueError(f"found {modality}, which is made of vectors; Replaced puts ids in place of ids, such as text")
        if not 0 < at(ratio, 0.0) < 1:
            raise ValueError(f"found ratio {at(ratio, 0.0)}; expected a share between 0 and 1, for example 0.15")
        self.policy = policy or Uniform()
        if self.policy.score is not None:
            raise ValueError(f"found {type(self.policy).__name__}, which asks the model before it hides; expected another policy")
        self.modality, self.ratio, self.ask, self.over, self.weight = modality, ratio, ask, over, weight
        self.needs = (modality, *(context or ()))
        check_context(model, modality, self.needs[1:])
        self.generator = generator(model, modality)
        answers = 1 if ask == "replaced" else encoder.vocab
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, answers))

    def init_rules(self) -> dict[str, Rule]:
        return {"head.2.weight": OUTPUT}

    def task(self, batch: Batch, hints: None = None) -> Batch:
        raw = batch[self.modality]
        hidden = self.policy(raw, batch["seed"], at(self.ratio, batch.get("progress", 0.0)), f"mask/{self.modality}")
        return {**batch, "hidden": hidden, "draw": random.token_seed(batch["seed"], raw)}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        generator = {"generator": batch["hidden"].sum()} if self.generator.learns else {}
        return {self.ask: self._asked(batch).sum(), **generator}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        raw, hidden, asked = batch[self.modality], batch["hidden"], self._asked(batch)
        parts = model.embed(part(batch, self.needs))
        proposed = self.generator(raw, parts[self.modality], hidden, batch["draw"])
        ids = torch.where(hidden, proposed.ids, raw.x)
        parts |= model.embed({self.modality: raw._replace(x=ids)})
        places = indices(asked)
        truth, given = raw.take(*places), ids.gather(1, places.column)
        answer = self.head(model(parts)[self.modality].take(places.column).x)
        if self.ask == "replaced":
            total, metrics = told(answer[..., 0], given != truth.x, truth.real())
        else:
            total, metrics = restored(answer, truth.x, truth.real())
        terms: dict[str, Term] = {self.ask: Term(total, asked.sum(), at(self.weight, batch.get("progress", 0.0)), metrics)}
        return terms if proposed.total is None else terms | {"generator": Term(proposed.total, hidden.sum())}

    def _asked(self, batch: Batch) -> Tensor:
        return batch["hidden"] if self.over == "hidden" else batch[self.modality].real()

    def after_step(self, model: Model, progress: float) -> None:
        self.generator.after_step()
