"""The mixture of sources follows what they pay: a controller sets their weights during the run, through the ledger of the data."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from headwater import tally
from headwater.controllers import Controller
from headwater.datamodules.mixture import CHANGES
from headwater.objectives.objective import Batch
from headwater.training.replay import held_out, loss_of


class Mixing(pl.Callback):
    """Every so many steps a controller turns what each source has paid into the weights of the mixture.

    A change holds from `data.notice` steps on, because loaders read ahead, and stands in the data's ledger; what the controller
    knows is in the checkpoint. So a run that is resumed draws what it would have drawn. Logs mixing/share/SOURCE and
    mixing/reward/SOURCE.

    Args:
        controller: Exp3, UCB, Progress, SkillGraph or Forecast of `headwater.controllers`, or one's own.
        reward: of a source: "progress" = how far its loss fell below its lowest, per step that was spent on it, "drop" = how far
            it fell, "loss" = what it is, "birdie" (all: `headwater.tally.reward`), or "value" = what its steps are worth for the
            feedback, as V-Pretraining tells it.
        losses: "train" = those of the source's own steps, which cost nothing and want `data.unit: batch`; "held_out" = those of
            the source of the same name in `data.held_out`, always on the same batches, which scatter less.
        every: steps between updates.
        floor: the least share of a source.
        part: of a `Weighted` objective whose losses count; None = the sum of all. Held out, it has to run in every step.
        batches: of each held-out source that are asked about.
    """

    def __init__(
        self,
        controller: Controller,
        reward: Literal["loss", "drop", "progress", "birdie", "value"] = "progress",
        losses: Literal["train", "held_out"] = "train",
        every: int = 20,
        floor: float = 0.02,
        part: str | None = None,
        batches: int = 4,
    ) -> None:
        if every < 1 or batches < 1:
            raise ValueError(f"found every={every} and batches={batches}; expected 1 or more steps between updates, and batches")
        if reward == "value" and losses != "train":
            raise ValueError("found reward: value and losses: held_out; values are those of training steps, leave `losses` out")
        self.controller, self.reward, self.losses, self.every, self.floor = controller, reward, losses, every, floor
        self.part, self.batches = part, batches
        self._kept: dict[str, list[Batch]] = {}
        self._seen: tuple[Tensor, Tensor, dict[str, Any]] | None = None  # turns, shares and value of the last step

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.losses == "train" and data.unit != "batch":
            raise ValueError(
                "found data.unit: sample, where a step's loss is that of a mixture; set data.unit: batch, or losses: held_out"
            )
        if trainer.max_steps > self.every * (CHANGES - 1):
            raise ValueError(
                f"found every={self.every} in a run of {trainer.max_steps} steps; the ledger holds {CHANGES} changes, so expected "
                f"{-(-trainer.max_steps // (CHANGES - 1))} or more"
            )
        self.tally = tally.Tally(len(data.train), self.controller, "loss" if self.reward == "value" else self.reward, self.floor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.losses == "held_out":
            self._kept = {name: list(held_out(trainer, name, self.batches)) for name in trainer.datamodule.train}  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Here and not behind the step, so that a checkpoint of any callback has all of the step before, and nothing of this."""
        self.settle()
        if trainer.global_step % self.every == 0 and (trainer.global_step or self.losses == "held_out"):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            paid = self.tally.update(self.asked(trainer, pl_module))
            if paid.isnan().all():
                return  # as long as nothing can be told of any source the recipe's weights hold
            shares = dict(zip(data.train, self.tally.share.tolist(), strict=True))
            data.reweigh(shares)
            told = {f"mixing/share/{name}": share for name, share in shares.items()}
            told |= {f"mixing/reward/{name}": x for name, x in zip(shares, paid.tolist(), strict=True) if math.isfinite(x)}
            for logger in trainer.loggers:
                logger.log_metrics(told, max(0, trainer.global_step - 1))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """What the step tells of its sources. What it is worth is known once the module has looked at its gradients."""
        if pl_module.step is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        step = data.first + trainer.global_step
        turns = data.plan.mixture.step(step).source
        planned = np.asarray([weights for start, weights in data.ledger.entries if start <= step][-1])
        drawn, chance = torch.from_numpy(np.bincount(turns, minlength=len(data.train)) / len(turns)), planned / planned.sum()
        told = pl_module.step.probe.told if self.reward == "value" else {"value": self.found(pl_module.step)}
        self._seen = drawn, torch.from_numpy(chance), told

    def settle(self) -> None:
        """Enter the last step into the books."""
        if self._seen is not None:
            drawn, chance, told = self._seen
            value = torch.as_tensor(told.get("value", torch.nan), dtype=torch.float64).reshape(1).cpu()
            self.tally.see(drawn, chance, value)
            self._seen = None

    def found(self, step: Any) -> Tensor | float:
        """The loss of a step, NaN where it does not count."""
        beginning = f"{self.part}/" if self.part else ""
        asked = [x for name, x in step.values.items() if step.numbers[name] > 0 and name.startswith(beginning)]
        return torch.stack(asked).sum() if asked and self.losses == "train" else torch.nan

    def asked(self, trainer: pl.Trainer, pl_module: Any) -> Tensor | None:
        """The held-out loss of every source, (K,); None where training losses are used."""
        if self.losses == "train":
            return None
        return torch.tensor([loss_of(trainer, pl_module, b, self.part) for b in self._kept.values()], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return dict(self.tally.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tally.load_state_dict(state_dict)
