"""The average of the weights over a run: what is evaluated and exported in place of the last step's."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from headwater.model import Model
from headwater.objectives.objective import Schedule, at
from headwater.teacher import Teacher


class Averaged(nn.Module):
    """The average of a backbone, and the snapshots that it is taken of; as a part of the Pretrainer moved, sharded and saved."""

    def __init__(self, backbone: Model, latest: int | None) -> None:
        super().__init__()
        self.teacher = Teacher(backbone)
        self.ring: Any = nn.ModuleList(Teacher(backbone) for _ in range(latest or 0))

    def add(self, backbone: Model, count: int, momentum: float) -> None:
        """One more snapshot; count: how many there were before.

        With a ring the average is the mean of what it holds. Without, average = momentum * average + (1 - momentum) * backbone,
        but never with less than 1 / (count + 1) for the backbone: at first it is the mean of all, and with momentum 1 it stays so.
        """
        if not self.ring:
            self.teacher.follow(backbone, min(momentum, count / (count + 1)))
            return
        self.ring[count % len(self.ring)].copy(backbone)
        for number, snapshot in enumerate(list(self.ring)[: count + 1]):
            self.teacher.follow(snapshot.module, number / (number + 1))


class Average(pl.Callback):
    """Keeps an average of the backbone's weights; validation, test, prediction and the exported backbone use it.

    A moving average (Polyak and Juditsky 1992; a schedule of the momentum as in BYOL, arXiv:2006.07733), the mean since `start`
    (momentum 1; SWA, Izmailov et al. 2018, arXiv:1803.05407), or the mean of the `latest` snapshots (LAWA, Kaddour 2022,
    arXiv:2209.14981). It costs one copy of the weights, and one more per snapshot that is kept; under FSDP2 shares of them.
    Lightning's WeightAveraging knows no sharded models and copies the objective too.

    Args:
        momentum: of the moving average, or a schedule of it.
        latest: average so many snapshots, whatever the momentum; None = the moving average.
        every: steps between snapshots.
        start: share of the run before the first snapshot; until then the average is the weights themselves.
    """

    def __init__(self, momentum: float | Schedule = 0.999, latest: int | None = None, every: int = 1, start: float = 0.0) -> None:
        if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
            raise ValueError(f"found momentum {momentum}; expected 0 to 1, the share of the average that stays")
        if (latest is not None and latest < 1) or every < 1 or not 0 <= start < 1:
            raise ValueError(f"found latest {latest}, every {every}, start {start}; expected 1 or more, 1 or more, and 0 up to 1")
        self.momentum, self.latest, self.every, self.start = momentum, latest, every, start
        self.count, self.step = 0, 0  # snapshots so far, and the last step that was looked at
        self._trained: Model | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Before parameters are sharded, or wrapped."""
        if not hasattr(pl_module, "average"):
            pl_module.average = Averaged(pl_module.backbone, self.latest)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._add(trainer, pl_module)  # of a checkpoint that was written before this callback had its turn

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._add(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin(pl_module)

    def _begin(self, pl_module: Any) -> None:
        """Before the first snapshot the average is the weights themselves."""
        if not self.count:
            pl_module.average.teacher.copy(pl_module.backbone)

    def _add(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step, self.step = self.step, trainer.global_step
        if step != self.step and self.step % self.every == 0 and pl_module.progress >= self.start:
            pl_module.average.add(pl_module.backbone, self.count, at(self.momentum, pl_module.progress))
            self.count += 1

    def _exchange(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The average in place of the backbone. Whole modules change places, so that no rank moves a weight."""
        self._begin(pl_module)
        self._trained, pl_module.backbone = pl_module.backbone, pl_module.average.teacher.module

    def _give_back(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._trained is not None:
            self._trained, pl_module.backbone = None, self._trained

    on_validation_start = on_test_start = on_predict_start = _exchange
    on_validation_end = on_test_end = on_predict_end = _give_back

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._give_back(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.step = state_dict["count"], state_dict["step"]


def kept(pretrainer: Any) -> Model:
    """What is evaluated and exported: the average where a run keeps one, else the backbone as the last step left it."""
    average = getattr(pretrainer, "average", None)
    return pretrainer.backbone if average is None else average.teacher.module
