"""Objectives that take turns as they pay: a controller sets the shares of the parts from what their losses did.

Choosing the mixture of objectives by reward is Birdie (Blouir et al. 2024, arXiv:2411.01030), whose reward and whose way to choose
are `reward: birdie` and `Forecast`; by learning progress between translation and denoising Schioppa et al. 2023, arXiv:2305.11778.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from headwater import distributed, random
from headwater.controllers import Controller, Exp3, proportional
from headwater.objectives.objective import Batch, Term
from headwater.objectives.weighted import Turns
from headwater.tally import Reward, Tally

LARGEST = 1 - 2**-53  # below 1: a draw must not lie on the last bound


class Bandit(nn.Module, Turns):
    """One part is drawn for each batch, as `Draw` does, by shares that a controller sets every so many steps.

    What a part paid follows from its own loss, over all its terms, ranks and pieces, on the batches that it was drawn for. All
    is kept with the objective: a resumed run draws what it would have drawn. A step that the guard leaves out teaches nothing.
    Logs train/PART/TERM/share.

    steps: that were taken.

    Args:
        controller: how rewards become shares; None = Exp3().
        reward: "progress" = how far the loss fell below its lowest, per turn, "drop" = how far it fell, "loss" = what it is,
            "birdie"; all as in `headwater.tally.reward`.
        every: steps between updates.
        floor: the least share of a part.
        seed: of the draws.
    """

    steps: Tensor

    def __init__(
        self,
        controller: Controller | None = None,
        reward: Reward = "progress",
        every: int = 10,
        floor: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"found every={every}; expected 1 or more steps between updates")
        self.controller, self.reward, self.every, self.floor, self.seed = controller or Exp3(), reward, every, floor, seed
        self.parts: tuple[str, ...] = ()
        self.heard: dict[str, Tensor] = {}  # term -> total and number of this rank in this step, and its weight

    def meet(self, parts: Sequence[str]) -> None:
        self.parts, self.tally = tuple(parts), Tally(len(parts), self.controller, self.reward, self.floor)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def chances(self, parts: Sequence[str]) -> Tensor:
        """(K,) the share of every part when only these can be drawn; all alike where they have none."""
        served = self.tally.share.new_tensor([float(name in parts) for name in self.parts])
        mine = self.tally.share * served
        return proportional(mine if mine.sum() > 0 else served)

    def choose(self, parts: Sequence[str], batch: Batch) -> dict[str, Tensor | None]:
        if not parts:
            raise ValueError(f"found a batch that serves none of {', '.join(self.parts)}; take its source out of the data")
        self.chance, self.heard = self.chances(parts), {}  # what was heard before a choice was a look ahead, or another batch
        upper = list(accumulate(self.chance.tolist()))
        draw = min(random.seed_of(self.seed, batch.get("step", 0)) / (1 << 63), LARGEST) * upper[-1]
        return {next(name for name, bound in zip(self.parts, upper, strict=True) if draw < bound): None}

    def see(self, terms: dict[str, Term]) -> dict[str, Term]:
        told = dict(zip(self.parts, self.tally.share.float(), strict=True))
        for name, term in terms.items():
            said = torch.stack([term.total.detach().double(), term.number.double(), term.total.new_tensor(term.weight).double()])
            self.heard[name] = said + torch.cat([self.heard[name][:2], said.new_zeros(1)]) if name in self.heard else said
        return {name: t._replace(metrics=t.metrics | {"share": told[part_of(name)]}) for name, t in terms.items()}

    def after_step(self) -> None:
        if not self.heard:
            return
        said = torch.stack([*self.heard.values()])
        total, number = distributed.total(said[:, :2]).unbind(1)
        drawn = self.chance.new_tensor([float(name == part_of(next(iter(self.heard)))) for name in self.parts])
        loss = (said[:, 2] * total / number.clamp(min=1)).sum()
        self.tally.see(drawn, self.chance, torch.where(drawn * number.sum() > 0, loss, torch.nan))
        self.heard = {}
        self.steps += 1
        if self.steps % self.every == 0:
            self.tally.update()


def part_of(term: str) -> str:
    """The part of a `Weighted` objective that a term belongs to."""
    return term.partition("/")[0]
