"""Connectionist temporal classification: a transcript whose letters are not aligned to the moments of a signal.

The probability of a transcript is the sum over all ways to spread its letters, in order and with blanks between, over the
moments (Graves et al. 2006; formula and gradient are torch's `ctc_loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import OUTPUT, Rule
from headwater.model import Model, Reader
from headwater.objectives.moments import Groups, groups
from headwater.objectives.objective import Batch, Objective, Term, part, wide
from headwater.tokens import Tokens, unpack


def needed(label: Tokens) -> Tensor:
    """(S,) moments that the transcripts in rows (S, L) take at least: one per letter, and a blank between two equal ones."""
    real = label.real()
    double = (label.x[:, 1:] == label.x[:, :-1]) & real[:, 1:] & real[:, :-1]
    return real.sum(1) + double.sum(1)


def by_time(x: Tensor, moments: Groups, sample: Tensor) -> Tensor:
    """Vectors of all moments (M, C) -> (longest, K, C) for the samples (K,), rising; zeros behind the end of each."""
    mine = torch.isin(moments.sample, sample)
    number, row = moments.number[mine], torch.searchsorted(sample, moments.sample[mine])
    return x.new_zeros(int(number.max()) + 1, len(sample), x.shape[-1]).index_put((number, row), x[mine])


class CTC(Objective):
    """Asks the moments of one modality for the letters of a transcript, and counts every letter as one target.

    Several tokens of one moment answer together. Samples whose signal is too short for their transcript are left out.

    Args:
        model: its encoder's tokens are asked, each modality alone.
        label: reads ids, such as Transcript.
        modality: what is asked.
        name: key of the labels in a batch.
    """

    def __init__(self, model: Model, label: Reader, modality: str = "audio", name: str = "transcript") -> None:
        super().__init__()
        if label.vocab is None:
            raise ValueError(f"{type(label).__name__} gives vectors; expected ids of letters, such as those of Transcript")
        self.modality, self.name, self.blank = modality, name, label.vocab
        self.needs, self.readers = (modality, name), {name: label}
        self.head = nn.Linear(model.encoder(modality).width, label.vocab + 1)

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT}

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds "spelled" (K,): the samples whose transcript fits into their moments."""
        label = batch[self.name]
        moments = groups(batch[self.modality]).per_sample(len(batch["sample"]))
        fits = needed(unpack(label)) <= moments[label.samples()]
        return {**batch, "spelled": label.samples()[fits]}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        label = batch[self.name]
        return {"ctc": (label.real() & torch.isin(label.sample(), batch["spelled"])).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        raw, label, spelled = batch[self.modality], batch[self.name], batch["spelled"]
        t = model.encode(model.embed(part(batch, (self.modality,))))[self.modality]
        moments = groups(raw)
        score = self.head(moments.mean(t.x[:, : raw.position.shape[1]]))
        score = wide(score).log_softmax(-1)
        number = self.numbers(batch)["ctc"]
        if not len(spelled):
            return {"ctc": Term(0 * score.sum(), number)}
        letters = unpack(label).map(lambda field: field[torch.isin(label.samples(), spelled)])
        lengths = moments.per_sample(len(batch["sample"]))[spelled], letters.real().sum(1)
        each = F.ctc_loss(by_time(score, moments, spelled), letters.x, *lengths, blank=self.blank, reduction="none")
        return {"ctc": Term(each.sum(), number)}
