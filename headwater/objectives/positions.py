"""Which token stands where: all positions are erased, and every token is asked for its own.

Position prediction as pretraining (MP3; Zhai et al. 2022, arXiv:2207.07611). Tokens come as a bag: coordinates are zero, and the
row is shuffled, so that the index tells nothing either, whatever the encoder makes of it. Attention looks at a random part of
the bag only, which makes the task harder and the features better; every token asks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import OUTPUT, Rule
from headwater.model import Model
from headwater.objectives.masks.policies import ascending, lengths, number
from headwater.objectives.objective import Batch, Objective, Term, cross_entropy
from headwater.objectives.targets.target import cell
from headwater.tokens import Tokens, unpack


class Positions(Objective):
    """Hides where the tokens of one modality stand.

    Args:
        model: its encoder is asked, without fusion.
        modality: whose places are hidden.
        cells: how many places each coordinate has: [1, 8, 8] for pictures of 8 x 8 patches at (time, row, column). Coordinates
            beyond the last place count as the last.
        seen: share of each sample's tokens that attention looks at.
    """

    def __init__(self, model: Model, modality: str = "image", cells: list[int] | None = None, seen: float = 0.25) -> None:
        super().__init__()
        encoder, self.cells = model.encoder(modality), cells or [1, 8, 8]
        if getattr(encoder, "causal", False):
            raise ValueError(f"the encoder of {modality} is causal, so the order of its tokens shows; expected one without order")
        if not 0 < seen <= 1 or min(self.cells) < 1:
            raise ValueError(f"found seen {seen} and cells {cells}; expected a share above 0 and how many places a coordinate has")
        self.modality, self.needs, self.seen = modality, (modality,), seen
        self.classes = math.prod(self.cells)
        self.head = nn.Linear(encoder.width, self.classes)

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT}

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """A bag per sample, (S, L): the tokens that may be looked at are its valid ones. "asked", "place": (S, L)."""
        raw = batch[self.modality]
        alone, seed = unpack(raw)._replace(order=None), batch["seed"][raw.samples()]
        shuffled, rank = ascending(alone, random.uniform(random.token_seed(seed, alone), (), f"positions/{self.modality}"))
        bag, seen = alone.take(shuffled), number(lengths(alone, len(seed)), self.seen)
        place = cell(bag.position, self.cells)
        asked = bag.real()
        bag = Tokens(bag.x, torch.zeros_like(bag.position), asked & (rank < seen[:, None]))
        return {**batch, self.modality: bag, "asked": asked, "place": place}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"positions": batch["asked"].sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        bag, asked = batch[self.modality], batch["asked"]
        y = model.encode(model.embed({self.modality: bag}))[self.modality].x[:, : bag.position.shape[1]]
        logits, truth = self.head(y[asked]), batch["place"][asked]
        metrics = {"accuracy": (logits.argmax(-1) == truth).float().mean()} if len(truth) else {}
        return {"positions": Term(cross_entropy(logits, truth).sum(), asked.sum(), metrics=metrics)}
