"""Metadata conditioning: what is known of a sample stands before its text, and is never asked for.

A model that is told where texts come from learns faster, and can be told later what to write like. In the last part of the
run nothing is told, so that the model works without (MeCo, Gao et al. 2025, arXiv:2501.01956; https://github.com/princeton-pli/MeCo;
what helps most: Fan et al. 2025, arXiv:2505.16570). The same before the text of a pair of towers is prefix conditioning
(Saito et al. 2022, arXiv:2206.01125).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model, Reader
from headwater.objectives.causal import Causal
from headwater.objectives.masks.policies import lengths
from headwater.objectives.objective import Batch, Objective, Schedule, at
from headwater.objectives.wrapped import Wrapped
from headwater.tokens import Tokens, concat


def told_before(t: Tokens, metadata: Tokens, samples: int) -> tuple[Tokens, Tensor]:
    """Each document behind its metadata, with positions that run on, and (B, N') True = metadata. samples: S.

    What belongs to no token of t is left out.
    """
    there = torch.isin(metadata.sample(), t.samples())
    metadata = metadata._replace(valid=metadata.real() & there)
    length = lengths(metadata, samples).long()
    time = t.position[..., :1] + length[t.sample()][..., None].to(t.position.dtype)
    both = concat([metadata, t._replace(position=torch.cat([time, t.position[..., 1:]], -1))])
    return both, both.place() < length[both.sample()]


class Conditioned(Wrapped):
    """Tells the model the metadata of a sample before its text, then hides what `inner` hides.

    Of an inner `Causal` no step of the metadata is asked for. Others, such as `Contrastive`, see it as part of the text.

    Args:
        model: handed to the inner objective.
        reader: of the metadata, as ids of the text's own tokenizer.
        inner: any objective that reads the text.
        modality: the text.
        rate: share of the samples that are told, drawn for each; a schedule ends it before the run ends.
        label: key of the metadata in the batch.
    """

    def __init__(
        self,
        model: Model,
        reader: Reader,
        inner: Callable[[Model], Objective] = Causal,
        modality: str = "text",
        rate: float | Schedule = 1.0,
        label: str = "metadata",
    ) -> None:
        super().__init__(model, inner)
        known = model.encoder(modality).vocab
        if reader.vocab is None or known is None or reader.vocab > known:
            raise ValueError(
                f"found metadata of {reader.vocab} ids before {modality}, which has {known}; expected ids of the same tokenizer"
            )
        if modality not in self.needs or label in self.needs:
            raise ValueError(f"found modality {modality} and label {label}; the inner objective reads {', '.join(self.needs)}")
        self.modality, self.label, self.rate = modality, label, rate
        self.readers, self.needs = {**self.readers, label: reader}, (*self.needs, label)

    @property
    def parts(self) -> dict[str, Objective]:
        """What it asks is one thing, and needs the metadata too."""
        return {"objective": self}

    def told(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch whose texts stand behind their metadata, and (B, N') True = metadata."""
        seed, metadata = batch["seed"], batch[self.label]
        chosen = random.uniform(seed, (), "metadata") < at(self.rate, batch.get("progress", 0.0))
        metadata = metadata._replace(valid=metadata.real() & chosen[metadata.sample()])
        text, before = told_before(batch[self.modality], metadata, len(seed))
        return {**batch, self.modality: text}, before

    def look(self, model: Model, batch: Batch) -> Any:
        return self.inner.look(model, self.told(batch)[0])

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        told, before = self.told(batch)
        task = self.inner.task(told, hints)
        return {**task, "asked": task["asked"] & ~before} if isinstance(self.inner, Causal) else task
