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
from headwater.objectives.moments import about, groups
from headwater.objectives.objective import Batch, Objective, Term, check_context, part, wide
from headwater.tokens import mean_pool


class Supervised(Objective):
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
        super().__init__()
        check_context(model, modality, context or ())
        if weight is not None and (weight.vocab is not None or weight.features != 1):
            raise ValueError(f"found {type(weight).__name__} as weight of labels; expected one number per sample, such as Numbers")
        self.modality, self.unit, self.name, self.asked = modality, unit, name, (modality, *(context or ()))
        self.readers = {name: label} if weight is None else {name: label, f"{name}_weight": weight}
        self.needs = (*self.asked, *self.readers)
        self.loss = (loss or CrossEntropy)(label)
        self.classes = self.loss.classes
        encoder = model.encoder(modality)
        alone = model.dim(modality) if unit == "sample" else encoder.width
        self.head = nn.Linear(model.width(modality) if context else alone, self.loss.size)
        self.task_vector = nn.Parameter(torch.randn(encoder.embedded) * 0.02) if told else None

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT} | ({} if self.task_vector is None else {"task_vector": TABLE})

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds "about" (B, L): what each label token asks, a row of `_features`, or -1."""
        label, raw = batch[self.name], batch[self.modality]
        if self.unit == "token":
            return {**batch, "about": about(label, raw)}
        samples = raw.samples()
        there = label.real() & torch.isin(label.sample(), samples)
        return {**batch, "about": torch.where(there, torch.searchsorted(samples, label.sample().contiguous()), -1)}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"supervised": (batch["about"] >= 0).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        label, asked = batch[self.name], batch["about"] >= 0
        answer = wide(self.head(self._features(model, batch)[batch["about"][asked]]))
        target = label.x[asked] if self.loss.ids else label.x[asked].to(answer.dtype)
        total = (self.loss(answer, target) * self._weights(batch)[label.sample()[asked]]).sum()
        with torch.no_grad():
            metrics = self.loss.metrics(answer, target) if len(target) else {}
        return {"supervised": Term(total, asked.sum(), metrics=metrics)}

    def _features(self, model: Model, batch: Batch) -> Tensor:
        """(M, D) what can be asked: of each sample that has the modality, or of each group of tokens."""
        raw, parts = batch[self.modality], model.embed(part(batch, self.asked))
        if self.task_vector is not None:
            t = parts[self.modality]
            parts[self.modality] = t._replace(x=t.x + self.task_vector.to(t.x.dtype))
        fused = len(self.asked) > 1
        t = (model(parts) if fused else model.encode(parts))[self.modality]
        if self.unit == "token":
            return groups(raw, batch[self.name].position.shape[-1]).mean(t.x[:, : raw.position.shape[1]])
        return mean_pool(t).x if fused else model.pool(self.modality, t).x

    def _weights(self, batch: Batch) -> Tensor:
        """(S,) by which the labels of each sample count."""
        weight = torch.ones(len(batch["seed"]), device=batch["seed"].device)
        if len(self.readers) == 1:
            return weight
        given = batch[f"{self.name}_weight"]
        real = given.real()
        return weight.to(given.x.dtype).index_put((given.sample()[real],), given.x[real][:, 0])
