"""Discrete diffusion: a drawn share of the ids is corrupted, and the model, which sees both ways, says what they were.

Masked diffusion of text (LLaDA, Nie et al. 2025, arXiv:2502.09992; MDLM, Sahoo et al. 2024, arXiv:2406.07524;
https://github.com/ML-GSAI/LLaDA) and of the codes of pictures (MaskGIT, Chang et al. 2022, arXiv:2202.04200), and ids that are
replaced by others, with predictions that are fed back (SUNDAE, Savinov et al. 2021, arXiv:2112.06749).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.masks.policies import lengths
from headwater.objectives.objective import Batch, Objective, Term, check_context, part
from headwater.objectives.replaced import pick
from headwater.objectives.tiled_likelihood import log_probabilities
from headwater.tokens import Tokens, concat, seats

LEAST = 1e-3  # share of ids that is corrupted, so that weights stay finite


def rates(draw: Tensor, schedule: Literal["uniform", "cosine"]) -> Tensor:
    """Draws (...) in [0, 1) -> shares (...) of ids that are corrupted: as they are, or MaskGIT's cos(pi u / 2), mostly large."""
    return (draw if schedule == "uniform" else torch.cos(draw * math.pi / 2)).clamp(min=LEAST)


def likelihood_weight(rate: Tensor, schedule: Literal["uniform", "cosine"]) -> Tensor:
    """1 / (r p(r)) for shares r (...) of density p: then the loss bounds -log p(x) from above (arXiv:2406.07524, equation 10)."""
    return (1 if schedule == "uniform" else math.pi / 2 * (1 - rate.square()).sqrt()) / rate


def filled(t: Tokens, end: int, places: Tensor, samples: int) -> Tokens:
    """Every document with as many tokens as there are places (L, P), `end` behind its own: lengths are learned as ids are."""
    sample, most = t.samples(), len(places)
    row, number = seats(t, sample)
    shape = len(t.x), 1 if t.document is None else int(number.max()) + 1 if len(number) else 1, most
    behind = torch.arange(most, device=sample.device) >= lengths(t, samples)[sample, None]
    valid = behind.new_zeros(shape).index_put((row, number), behind).flatten(1)
    document = sample.new_zeros(shape).index_put((row, number), sample[:, None].expand(-1, most)).flatten(1)
    x, position = t.x.new_full(shape, end).flatten(1), places.to(t.position).expand(*shape, -1).flatten(1, 2)
    return concat([t, Tokens(x, position, valid, None if t.document is None else document)])


class DiscreteDiffusion(Objective):
    """Hides a share of a modality's ids that is drawn per sample, from nearly none to all.

    Args:
        model: its encoder's `unembed` answers, so what is learned here can generate; it must see both ways. A language model
            that was trained by `Causal` can go on here.
        modality: made of ids: text, actions, the codes of a tokeniser.
        context: other modalities that are known, as tokens through the model's fusion.
        corruption: "absorb" puts the encoder's `start` id in place of ids, and these are asked for; "uniform" puts any other
            ids, and all are asked for.
        schedule: of the shares: all alike, or MaskGIT's cosine.
        weight: of absorbed ids: "likelihood" = by the share, so that the loss bounds -log p(x); "equal" = all count the same, as in
            MaskGIT.
        unroll: weight of a second term: answers are drawn, fed back, and corrected.
        fill: texts that are shorter than their reader's length are filled up with its end, so that generation learns how long
            they are. Without, it must be told.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        context: list[str] | None = None,
        corruption: Literal["absorb", "uniform"] = "absorb",
        schedule: Literal["uniform", "cosine"] = "uniform",
        weight: Literal["likelihood", "equal"] = "likelihood",
        unroll: float = 0.0,
        fill: bool = False,
    ) -> None:
        super().__init__()
        encoder = model.encoder(modality)
        if encoder.vocab is None or encoder.start is None:
            raise ValueError(f"{modality} is made of vectors; discrete diffusion needs ids and a start id. Use Flow for vectors")
        if getattr(encoder, "causal", False):
            raise ValueError(f"the encoder of {modality} never looks ahead; set `causal: false` on it, the weights stay")
        if fill and encoder.reader.end is None:
            raise ValueError(f"found fill, but {modality} has no id that ends it; leave fill out")
        if unroll < 0:
            raise ValueError(f"found unroll {unroll}; expected a weight of 0 or more")
        self.modality, self.needs = modality, (modality, *(context or ()))
        check_context(model, modality, self.needs[1:])
        self.vocab, self.mask, self.classes = encoder.vocab, encoder.start, encoder.vocab
        self.corruption, self.schedule, self.unroll = corruption, schedule, unroll
        self.bound = corruption == "absorb" and weight == "likelihood"
        self.end = encoder.reader.end if fill else None
        self.places = encoder.blank().position[0] if fill else None

    def task(self, batch: Batch, hints: None = None) -> Batch:
        raw = batch[self.modality]
        if self.end is not None and self.places is not None:
            raw = filled(raw, self.end, self.places, len(batch["seed"]))
        own, real = random.token_seed(batch["seed"], raw), raw.real()
        rate = rates(random.uniform(batch["seed"], (), "diffusion/rate"), self.schedule)
        hidden = real & (random.uniform(own, (), "diffusion/hidden") < rate[raw.sample()])
        other = self.mask if self.corruption == "absorb" else (random.uniform(own, (), "diffusion/other") * self.vocab).long()
        asked = hidden if self.corruption == "absorb" else real
        weight = likelihood_weight(rate, self.schedule)[raw.sample()] if self.bound else asked.to(rate.dtype)
        shown = raw._replace(x=torch.where(hidden, other, raw.x))
        return {**batch, self.modality: shown, "answer": raw.x, "asked": asked, "weight": weight, "draw": own}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"diffusion": self._number(batch)} | ({"unrolled": batch[self.modality].real().sum()} if self.unroll else {})

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        states = self.states(model, batch)
        terms = self.score(model, states, batch)
        if not self.unroll:
            return terms
        shown, asked, unembed = batch[self.modality], batch["asked"], model.encoder(self.modality).unembed
        with torch.no_grad():
            chance = unembed(states[asked]).float().softmax(-1)
            drawn = pick(chance, random.uniform(batch["draw"][asked], (), "diffusion/answer"))
        again = {**batch, self.modality: shown._replace(x=shown.x.masked_scatter(asked, drawn))}
        real = shown.real()
        log_p = log_probabilities(unembed, self.states(model, again)[real], batch["answer"][real], alike=True)
        return terms | {"unrolled": Term(-log_p.sum(), real.sum(), self.unroll)}

    def states(self, model: Model, batch: Batch) -> Tensor:
        """The vectors (B, N, D) that answer at every place, on what `task` returned."""
        y = model(model.embed(part(batch, self.needs)))[self.modality].x
        return y[:, : batch[self.modality].position.shape[1]]

    def score(self, model: Model, states: Tensor, batch: Batch) -> dict[str, Term]:
        """The first term, given the vectors that answer."""
        asked, unembed = batch["asked"], model.encoder(self.modality).unembed
        log_p = log_probabilities(unembed, states[asked], batch["answer"][asked], alike=not self.bound)
        return {"diffusion": Term(-(log_p * batch["weight"][asked]).sum(), self._number(batch))}

    def _number(self, batch: Batch) -> Tensor:
        return (batch[self.modality].real() if self.bound else batch["asked"]).sum()
