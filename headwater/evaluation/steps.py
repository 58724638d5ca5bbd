"""How well the next step is predicted on held-out sequences, against answers that need no model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from headwater.evaluation.results import Result, by_sample, interval
from headwater.objectives import Causal


class NextStep(pl.Callback):
    """Accuracy of a causal part with ids, every step given the true past, on each held-out source that serves its needs.

    Stands against the most frequent step of the same source, and against repeating the last step.

    Args:
        part: name of the Causal part in a weighted objective; None = the objective itself.
    """

    def __init__(self, part: str | None = None) -> None:
        self.part = part
        self.results: list[Result] = []

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        parts = getattr(pl_module.objective, "parts", {})
        if self.part is not None and self.part not in parts:
            raise ValueError(f"NextStep should score the part {self.part!r}, but the objective has the parts {sorted(parts)}")
        self.objective = pl_module.objective if self.part is None else parts[self.part]
        if not isinstance(self.objective, Causal) or not self.objective.ids:
            raise ValueError(f"NextStep scores a Causal objective over ids; {self.part or 'the objective'} is another one")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.results = []
        self._kept: dict[int, list[tuple[Tensor, ...]]] = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not all(need in batch for need in self.objective.needs):
            return
        task = self.objective.task(batch)
        predicted = self.objective.predict(pl_module.backbone, task).argmax(-1)
        answer = torch.where(task["asked"], task["answer"], -1)
        row = (batch["sample"], wide(predicted), wide(answer))
        self._kept.setdefault(dataloader_idx, []).append(row)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for number, rows in sorted(self._kept.items()):
            sample, predicted, answer = by_sample(*(torch.cat(column) for column in zip(*rows)))
            name = trainer.datamodule.validation[number].name
            self.results.append(compare(name, self.objective.modality, sample, predicted, answer))

    on_test_epoch_start, on_test_batch_end, on_test_epoch_end = (
        on_validation_epoch_start,
        on_validation_batch_end,
        on_validation_epoch_end,
    )


def wide(x: Tensor, width: int = 256) -> Tensor:
    """(B, N) -> (B, width), filled with -1, so that batches of different length can be joined."""
    return torch.nn.functional.pad(x[:, :width], (0, width - min(width, x.shape[1])), value=-1)


def compare(source: str, modality: str, sample: Tensor, predicted: Tensor, answer: Tensor) -> Result:
    """Accuracy over all real steps. predicted, answer: (S, N) ids, answer -1 = no step. Whole sequences are resampled."""
    real = answer >= 0
    common = answer[real].bincount().argmax()
    last = torch.cat([torch.full_like(answer[:, :1], int(common)), answer[:, :-1]], 1)
    right = (predicted == answer)[real].numpy().astype(float)
    trivial = {"majority": (answer[real] == common).double().mean(), "repeat last": (last == answer)[real].double().mean()}
    low, high = interval(right, np.repeat(sample.numpy(), real.sum(1).numpy()))
    return Result(
        source, f"{modality} accuracy", float(right.mean()), low, high, {k: float(v) for k, v in trivial.items()}, len(right)
    )
