"""What sources, or objectives, have paid: losses between updates, the rewards they mean, and the record that a controller sees."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from headwater.controllers import Controller, Seen, floored
from headwater.init import Rule

Reward = Literal["loss", "drop", "progress", "birdie"]


def reward(kind: Reward, before: Tensor, now: Tensor, turns: Tensor) -> Tensor:
    """(K,) float64 from mean losses before and now, and the turns in between; `lowest` says which losses before.

    "loss": what it is now (Albalak et al. 2023, arXiv:2312.02406). "drop": by how much it fell. "progress": by how much it fell
    below the lowest that it ever was, per turn, 0 where it did not: learning again what was forgotten in between does not count.
    "birdie": clip(-100 e tanh(e sqrt(now * before) * ((now - before) / before)^3), -1, 1), which makes little of small changes
    (Blouir et al. 2024, arXiv:2411.01030; https://github.com/samblouir/birdie); for losses above 0. NaN where a loss is missing.
    """
    if kind == "loss":
        return now
    if kind == "birdie":
        cubed = math.e * (now * before).sqrt() * ((now - before) / before) ** 3
        return (-100 * math.e * cubed.tanh()).clamp(-1, 1)
    return (before - now).clamp(min=0) / turns.clamp(min=1) if kind == "progress" else before - now


def lowest(kind: Reward, before: Tensor, now: Tensor) -> Tensor:
    """(K,): what the next loss is compared with, the lowest so far for "progress", else the last; NaN says nothing."""
    return before.fmin(now) if kind == "progress" else torch.where(now.isnan(), before, now)


class Tally(nn.Module):
    """Counts what K arms were drawn for and what it brought, and asks a controller for their shares. All it knows are buffers.

    Every rank is to be told the same.

    Args:
        arms: K.
        controller: who decides.
        kind: of reward.
        floor: the least share of an arm.
    """

    losses: Tensor  # (K,) sums since the last update, of each arm's own turns
    asked: Tensor  # (K,) turns whose losses these are
    turns: Tensor  # (K,) turns since the last update
    chance: Tensor  # (K,) sums of the shares that were planned for them
    before: Tensor  # (K,) what losses are compared with, NaN before an arm was looked at
    record: Tensor  # (3, window, K) reward, turns and share of the last updates, NaN where there was none yet
    share: Tensor  # (K,) what the controller said last

    def __init__(self, arms: int, controller: Controller, kind: Reward = "progress", floor: float = 0.02) -> None:
        super().__init__()
        if arms < 2 or not 0 <= floor * arms < 1:
            raise ValueError(
                f"found {arms} to choose from and a floor of {floor}; expected 2 or more, and a floor below 1 / {arms}"
            )
        self.arms, self.controller, self.kind, self.floor = arms, controller, kind, floor
        for name, rule in self.init_rules().items():
            self.register_buffer(name, rule.value())  # type: ignore[operator, misc]

    def init_rules(self) -> dict[str, Rule]:
        """All buffers as they start."""
        arms = (self.arms,)
        starts: dict[str, tuple[tuple[int, ...], float]] = dict.fromkeys(("losses", "asked", "turns", "chance"), (arms, 0.0))
        starts |= {
            "before": (arms, math.nan),
            "record": ((3, self.controller.window, *arms), math.nan),
            "share": (arms, 1 / self.arms),
        }
        return {name: Rule("fixed", partial(torch.full, *start, dtype=torch.float64)) for name, start in starts.items()}

    def see(self, drawn: Tensor, chance: Tensor, losses: Tensor | None = None) -> None:
        """One step, (K,) each. drawn: how often each arm was drawn; chance: the shares that were planned; losses: what the arms
        that were drawn lost in the mean, NaN = not known."""
        self.turns += drawn
        self.chance += chance
        if losses is not None:
            known = (drawn > 0) & losses.isfinite()
            self.losses += torch.where(known, losses * drawn, 0.0)
            self.asked += torch.where(known, drawn, 0.0)

    def update(self, losses: Tensor | None = None) -> Tensor:
        """Close the books: the rewards (K,), and `share` anew where there was any. losses: of all arms, in place of their own."""
        now = self.losses / self.asked if losses is None else losses
        paid = reward(self.kind, self.before, now, self.turns)
        if not paid.isnan().all():
            planned = self.chance / self.chance.sum() if self.chance.sum() > 0 else self.share
            row = torch.stack([paid, self.turns, planned])
            self.record.copy_(torch.cat([self.record[:, 1:], row[:, None]], 1))
            known = self.record[:, ~self.record[2].isnan().any(1)]
            self.share.copy_(floored(self.controller(Seen(*known)), self.floor))
        self.before.copy_(lowest(self.kind, self.before, now))
        for sums in (self.losses, self.asked, self.turns, self.chance):
            sums.zero_()
        return paid
