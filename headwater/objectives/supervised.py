"""Labels as an objective: a head on whole samples or on single tokens, for the samples that have a label.

A label without answer, and a sample without label, count nothing and have no gradient, so that labelled and unlabelled data mix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from headwater.init import OUTPUT, TABLE, Rule
from headwater.model import Model, Reader
from headwater.objectives.label_losses import CrossEntropy, LabelLoss
from headwater.objectives.labelled import Labelled
from headwater.objectives.objective import Batch, Term, wide


class Supervised(Labelled):
    """Asks one modality, alone or fused with others, for a label.

    Args:
        model: read for widths.
        label: how labels are read, such as Category, Categories or Numbers.
        modality: what is asked.
        loss: CrossEntropy, Binary, Regression, Ordinal or Votes; None = CrossEntropy.
        unit: "sample" = the pooled vector answers each label of the sample. "token" = a label is about the tokens with its own
            coordinates: with one coordinate all tokens of that moment, with three one patch; the mean of these answers.
        context: other modalities that may help, through the model's fusion.
        name: key of the labels in a batch; objectives with different labels give them different names.
        weight: reader of one number per sample by which its labels count, such as how sure a weak label is; 1 where it is
            missing. None = all count alike.
        told: add a learned vector to all tokens of the modality, so that the encoder knows which task is asked, as ERNIE 2.0
            does (Sun et al. 2019, arXiv:1907.12412); prefix conditioning (Saito et al. 2022, arXiv:2206.01125) has the same aim:
            what holds for one source of labels alone stays in the vector.
    """

    def __init__(
        self,
        model: Model,
        label: Reader,
        modality: str = "image",
        loss: Callable[[Reader], LabelLoss] | None = None,
        unit: Literal["sample", "token"] = "sample",
        context: list[str] | None = None,
        name: str = "label",
        weight: Reader | None = None,
        told: bool = False,
    ) -> None:
        super().__init__(model, label, modality, unit, context, name, weight)
        self.loss = (loss or CrossEntropy)(label)
        self.classes = self.loss.classes
        self.head = nn.Linear(self.width, self.loss.size)
        self.task_vector = nn.Parameter(torch.randn(model.encoder(modality).embedded) * 0.02) if told else None

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT} | ({} if self.task_vector is None else {"task_vector": TABLE})

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"supervised": (batch["about"] >= 0).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        label, asked = batch[self.name], batch["about"] >= 0
        answer = wide(self.head(self.features(model, batch, self.task_vector)[batch["about"][asked]]))
        target = label.x[asked] if self.loss.ids else label.x[asked].to(answer.dtype)
        total = (self.loss(answer, target) * self.weights(batch)[label.sample()[asked]]).sum()
        with torch.no_grad():
            metrics = self.loss.metrics(answer, target) if len(target) else {}
        return {"supervised": Term(total, asked.sum(), metrics=metrics)}
