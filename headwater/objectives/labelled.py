"""What labels are about: the features of a modality, of whole samples or of single tokens, that they are asked of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headwater.model import Model, Reader
from headwater.objectives.moments import about, groups
from headwater.objectives.objective import Batch, Objective, check_context, part
from headwater.tokens import Pooled, Tokens, mean_pool


class Labelled(Objective):
    """Reads labels and finds the features that they are about; how the two are compared, subclasses say.

    Args:
        model, label, modality, unit, context, name, weight: see Supervised.
    """

    def __init__(
        self,
        model: Model,
        label: Reader,
        modality: str = "image",
        unit: Literal["sample", "token"] = "sample",
        context: list[str] | None = None,
        name: str = "label",
        weight: Reader | None = None,
    ) -> None:
        super().__init__()
        check_context(model, modality, context or ())
        if weight is not None and (weight.vocab is not None or weight.features != 1):
            raise ValueError(f"found {type(weight).__name__} as weight of labels; expected one number per sample, such as Numbers")
        self.modality, self.unit, self.name, self.asked = modality, unit, name, (modality, *(context or ()))
        self.readers = {name: label} if weight is None else {name: label, f"{name}_weight": weight}
        self.needs = (*self.asked, *self.readers)
        alone = model.dim(modality) if unit == "sample" else model.encoder(modality).width
        self.width = model.width(modality) if context else alone

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds "about" (B, L): what each label token asks, a row of `features`, or -1."""
        label, raw = batch[self.name], batch[self.modality]
        if self.unit == "token":
            return {**batch, "about": about(label, raw)}
        samples = raw.samples()
        there = label.real() & torch.isin(label.sample(), samples)
        return {**batch, "about": torch.where(there, torch.searchsorted(samples, label.sample().contiguous()), -1)}

    def features(self, model: Model, batch: Batch, told: Tensor | None = None) -> Tensor:
        """(M, D) what can be asked: of each sample that has the modality, or of each group of tokens.

        told: (E,) a vector that is added to every embedded token of the modality.
        """
        raw, parts = batch[self.modality], part(batch, self.asked)
        if self.unit == "sample":
            return self.pooled(model, parts, told).x
        contextual = self.contextual(model, parts, told)
        return groups(raw, batch[self.name].position.shape[-1]).mean(contextual.x[:, : raw.position.shape[1]])

    def pooled(self, model: Model, parts: dict[str, Tokens], told: Tensor | None = None) -> Pooled:
        """Raw tokens -> one vector per sample that has the modality."""
        t = self.contextual(model, parts, told)
        return mean_pool(t) if len(self.asked) > 1 else model.pool(self.modality, t)

    def contextual(self, model: Model, parts: dict[str, Tokens], told: Tensor | None = None) -> Tokens:
        """Raw tokens -> those of the modality, encoded alone or fused with the others."""
        embedded = model.embed(parts)
        if told is not None:
            t = embedded[self.modality]
            embedded[self.modality] = t._replace(x=t.x + told.to(t.x.dtype))
        return (model(embedded) if len(self.asked) > 1 else model.encode(embedded))[self.modality]

    def weights(self, batch: Batch) -> Tensor:
        """(S,) by which the labels of each sample count."""
        weight = torch.ones(len(batch["seed"]), device=batch["seed"].device)
        if len(self.readers) == 1:
            return weight
        given = batch[f"{self.name}_weight"]
        real = given.real()
        return weight.to(given.x.dtype).index_put((given.sample()[real],), given.x[real][:, 0])
