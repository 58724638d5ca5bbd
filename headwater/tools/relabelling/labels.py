"""Labels by vote: models that tell how likely each class is, each of them looking at several views of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater import random
from headwater.datamodules.collate import collate
from headwater.model import Reader
from headwater.tokens import Tokens
from headwater.tools.relabelling.annotator import Annotator, Answer, Members, read
from headwater.tools.relabelling.choosing import vote
from headwater.view import View

Batch = dict[str, Tokens]  # raw tokens, one sample per row


class Voice(nn.Module):
    """One model that tells how likely each class is. readers: of the modalities that it looks at."""

    readers: dict[str, Reader]

    def forward(self, batch: Batch) -> Tensor:
        """(B, L, C) probabilities for the L labels of each sample, NaN where there is nothing to label."""
        raise NotImplementedError(f"{type(self).__name__}.forward must return probabilities")


class Labels(Annotator):
    """Voices that vote: each model looks at the plain signal and at some random views of it.

    The score is the mean probability of what wins, over voices and over the labels of a sample.

    Args:
        voices: models. classes: their names, in one order for all. field, member: where labels stand.
        views: random views beside the plain signal. view: what they are like; None = what each reader finds fit.
        several: a sample has a list of labels, one per moment.
    """

    def __init__(
        self,
        voices: Sequence[Voice],
        classes: Sequence[str],
        field: str | None,
        member: str,
        views: int = 0,
        view: View | None = None,
        several: bool = False,
    ) -> None:
        super().__init__()
        if views < 0:
            raise ValueError(f"found {views} views; expected none or more")
        self.voices: Any = nn.ModuleList(voices)
        self.classes = list(classes)
        self.field, self.member = field, member
        self.views, self.view, self.several = views, view or View(), several

    @torch.no_grad()
    def forward(self, samples: Sequence[Members], seeds: Sequence[int]) -> list[Answer | str]:
        asked = [(voice, number) for voice in self.voices for number in range(self.views + 1)]
        found: list[Any] = [
            [read(voice.readers, one, self._look(seed, number)) for voice, number in asked] for one, seed in zip(samples, seeds)
        ]
        wrong = [next((sample for sample in looks if isinstance(sample, str)), "") for looks in found]
        columns = list(zip(*(looks for looks, why in zip(found, wrong) if not why)))
        if not columns:
            return list(wrong)
        p = [voice(self._batch(voice, column)) for (voice, _), column in zip(asked, columns)]
        if len({x.shape for x in p}) > 1:
            raise ValueError(f"models or views tell of {', '.join(str(tuple(x.shape)) for x in p)} samples, labels and classes")
        answers = iter(self._answers(torch.stack(p).cpu()))
        return [why or next(answers) for why in wrong]

    def _look(self, seed: int, number: int) -> View | None:
        """The plain signal first, then random views of it."""
        return replace(self.view, seed=random.seed_of(seed, number)) if number else None

    def _batch(self, voice: Voice, samples: Sequence[Any]) -> Batch:
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        return {name: t.map(lambda field: field.to(device)) for name, t in collate(samples, list(voice.readers)).items()}

    def _answers(self, p: Tensor) -> list[Answer | str]:
        """Probabilities (V, B, L, C) -> an answer per sample."""
        votes, out = vote(p), list[Answer | str]()
        for label, score, agreement in zip(*votes):
            known = ~score.isnan()
            if not bool(known.any()):
                out.append("there is nothing to label in it")
                continue
            last = int(known.nonzero().max()) + 1
            names = [self.classes[k] if real else None for k, real in zip(label[:last].tolist(), known[:last].tolist())]
            sure, alike = float(score[known].mean()), float(agreement[known].mean())
            out.append(Answer(names, sure, alike) if self.several else Answer(names[0], sure, alike, names[0]))
        return out
