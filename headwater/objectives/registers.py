"""Look-ahead by registers: learned tokens between the others predict what comes later, and no other token sees them.

A register at place t sees what place t sees. Its position is that of a place d steps further on, for which it answers, so the
model learns to look ahead while nothing of it changes: without registers the ordinary tokens have the same states. The only
parameter that is thrown away is the register itself (MuToR, Gerontopoulos et al. 2025, arXiv:2505.10518;
https://github.com/nasosger/MuToR).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import TABLE, Rule
from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.likelihood import Likelihood
from headwater.objectives.masks.policies import indices
from headwater.objectives.multi_token import cost, further
from headwater.objectives.objective import Batch, Schedule, Term, at, part
from headwater.tokens import Tokens, cat


class Registers(Causal):
    """Hides the future of one modality, and asks registers for what lies further ahead than the next step.

    The trunk has to know positions by something else than the order of tokens: sines, rotation or distances.

    Args:
        model: its encoder's `unembed` answers for registers too.
        modality, prefix, context, likelihood: as in Causal; the likelihood counts for registers too.
        farthest: each register's distance d is drawn from 1 to this, 1 = the token behind the next one.
        share: of the places that get a register.
        weight: of the registers' loss beside that of the next token, which is 1; a number or a schedule.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        prefix: list[str] | None = None,
        context: list[str] | None = None,
        likelihood: Likelihood | None = None,
        farthest: int = 4,
        share: float = 1.0,
        weight: float | Schedule = 0.4,
    ) -> None:
        super().__init__(model, modality, prefix, context, likelihood)
        if farthest < 1 or not 0 < share <= 1:
            raise ValueError(f"found farthest {farthest} and share {share}; expected 1 or more, and a share from above 0 to 1")
        self.farthest, self.share, self.weight = farthest, share, weight
        self.register = nn.Parameter(torch.randn(model.encoder(modality).embedded) * 0.02)

    def init_rules(self) -> dict[str, Rule]:
        return {"register": TABLE}

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds `distance` (B, N): how far ahead the register at each place looks, 0 = there is none."""
        task = super().task(batch, hints)
        draw = random.uniform(random.token_seed(batch["seed"], task[self.modality]), (2,), "registers")
        distance = 1 + (draw[..., 0] * self.farthest).long()
        return {**task, "distance": torch.where(draw[..., 1] < self.share, distance, 0)}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return super().numbers(batch) | {"registers": self.registers(batch).real().sum()}

    def registers(self, batch: Batch) -> Tokens:
        """The registers, whose targets are asked for: x their answers, (B, R) or (B, R, features), at the positions of these."""
        t, distance = batch[self.modality], batch["distance"]
        column, there = further(t, distance)
        places = indices(there & (distance > 0) & batch["asked"].gather(1, column))
        later = t._replace(x=batch["answer"]).take(column.gather(1, places.column))
        return t.take(*places)._replace(x=later.x, position=later.position)

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        parts, answer = model.embed(part(batch, self.seen)), self.registers(batch)
        ordinary = parts[self.modality]
        length, asked = ordinary.position.shape[1], answer.real()
        parts[self.modality] = cat([ordinary, self.placed(answer, ordinary.x)])
        y = model(parts, True)[self.modality].x
        terms = self.score(model, y[:, :length], batch)
        total = cost(self, model, y[:, length : length + answer.position.shape[1]], answer, asked, batch)
        return terms | {"registers": Term(total, asked.sum(), at(self.weight, batch.get("progress", 0.0)))}

    def placed(self, answer: Tokens, like: Tensor) -> Tokens:
        """The registers as they go in. None is `valid`, so that each sees and none is seen."""
        x = self.register.to(like.dtype).expand(*answer.position.shape[:2], -1)
        return answer._replace(x=x, valid=torch.zeros_like(answer.real()))
