"""Properties of hidden tokens as targets of masked prediction: how much of a word must be asked for to learn language?

First letters, sums of letters and random classes (Alajrami and Aletras 2022, arXiv:2203.10415). Tags that only a corpus knows
are labels: see Supervised with unit "token".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.objective import Term
from headwater.objectives.targets.target import Asked, Target
from headwater.tokens import Tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def first_letter(word: str) -> int:
    """0 to 25 = a to z in either case; 26 = a digit, 27 = another sign, 28 = nothing to be seen."""
    word = word.strip().lower()
    return 28 if not word else LETTERS.find(word[0]) if word[0] in LETTERS else 26 if word[0].isdigit() else 27


def letter_sum(word: str, classes: int) -> int:
    """The sum of the numbers of its letters, modulo `classes`."""
    return sum(map(ord, word)) % classes


class Properties(Target):
    """One class for each id of a vocabulary, made of its text.

    Args:
        model: its reader tells what each id says.
        modality: a modality of ids.
        kind: "first" = 29 classes by the first letter; "sum" = the sum of the letters modulo `classes`; "random" = one of
            `classes` that means nothing, the control.
        classes: of "sum" and "random".
    """

    ids = True
    table: Tensor

    def __init__(self, model: Model, modality: str, kind: Literal["first", "sum", "random"] = "first", classes: int = 5) -> None:
        super().__init__(model, modality)
        encoder = model.encoder(modality)
        if encoder.vocab is None or classes < 2:
            raise ValueError(f"found {classes} classes for {modality} of {encoder.vocab} ids; expected ids, and 2 classes or more")
        self.size = 29 if kind == "first" else classes
        every = torch.arange(encoder.vocab)
        if kind == "random":
            table = (random.uniform(every, (), "properties") * classes).long()
        else:
            words = [encoder.reader.restore(Tokens(k.view(1, 1), torch.zeros(1, 1, 1))) for k in every]
            table = torch.tensor([first_letter(word) if kind == "first" else letter_sum(word, classes) for word in words])
        self.register_buffer("table", table, persistent=False)

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        return self.table[asked.raw.x], {}
