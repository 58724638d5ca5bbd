"""Gap sentences: those are asked for that have most in common with the rest of their document, as if they were a summary.

PEGASUS (Zhang et al. 2019, arXiv:1912.08777; https://github.com/google-research/pegasus).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.objectives.masks.policies import lengths, number, smallest
from headwater.objectives.noise.denoisers import Denoiser, Pair
from headwater.objectives.noise.operators import ENDS, Ids, beginning, begins, sentences, shares
from headwater.objectives.objective import Schedule, at
from headwater.tokens import Tokens


class GapSentences(Denoiser):
    """Whole sentences become one mask each, and are asked for one after the other.

    Those are taken that score highest by `overlap` ("Ind" in section 3.1.1 of the paper). A document of one sentence is asked for
    whole.

    Args:
        rate: share of the sentences, at least one and of several not all; a number or a schedule over the run.
        size: ids per n-gram that is compared: 1 for words, about 4 for bytes.
        unique: n-grams count once per sentence ("Uniq"), else as often as they come ("Orig").
        pick: by "score", or the "first" sentences, or "random" ones.
        ends: ids that end a sentence; None = those of `! . ?` and a new line in bytes.
        mode: see Denoiser.
    """

    def __init__(
        self,
        rate: float | Schedule = 0.3,
        size: int = 1,
        unique: bool = False,
        pick: Literal["score", "first", "random"] = "score",
        ends: list[int] | None = None,
        mode: int | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"found size {size}; expected 1 or more ids per n-gram")
        self.rate, self.size, self.unique, self.pick = shares("rate", rate), size, unique, pick
        self.ends: Sequence[int] = ENDS if ends is None else ends
        self.mode = mode

    def marks(self, length: int) -> int:
        return 1

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Pair:
        unit = sentences(t, self.ends)
        head = begins(t, unit)
        if self.pick == "score":
            key = -overlap(t, unit, self.size, self.unique)
        elif self.pick == "first":
            key = t.place().double()
        else:
            key = random.uniform(random.token_seed(seed, t), (), "sentences")
        heads = t._replace(valid=head)
        gap = smallest(heads, key, number(lengths(heads, len(seed)), at(self.rate, progress)))
        hidden = gap.gather(1, beginning(head)) & t.real()
        source = t._replace(x=torch.where(gap, ids.marks[0], t.x), valid=t.real() & (gap | ~hidden))
        return Pair(source, t._replace(valid=hidden))


def overlap(t: Tokens, unit: Tensor, size: int = 1, unique: bool = False) -> Tensor:
    """(B, N) float64: ROUGE-n F1 of the sentence of each token with the rest of its document; 0 where it has no n-gram.

    F1 = 2 m / (a + b) with m n-grams that both have, a of the sentence, b of the rest; those across sentences do not count.
    unit: (B, N) number of the sentence. unique: see GapSentences.
    """
    index = torch.arange(unit.numel(), device=unit.device).view(unit.shape)  # tokens of the batch as one row
    of_document = index - t.place()
    of_sentence = index[:, :1] + beginning(begins(t, unit))
    gram, whole = torch.zeros_like(t.x), t.real()
    for far in range(size):
        within = F.pad(of_sentence.where(t.real(), -1), (0, far), value=-1)[:, far:]
        gram, whole = random.fold(gram, F.pad(t.x, (0, far))[:, far:]), whole & (within == of_sentence)
    document, sentence, gram = of_document[whole], of_sentence[whole], gram[whole]
    _, kind, own = random.fold(gram, sentence).unique(return_inverse=True, return_counts=True)  # each gram of each sentence
    one = torch.zeros_like(own).scatter(0, kind, torch.arange(len(kind), device=kind.device))
    document, sentence = document[one], sentence[one]
    _, kind, holders = random.fold(gram[one], document).unique(return_inverse=True, return_counts=True)  # each of each document
    rest = torch.zeros_like(own).index_add(0, kind, own)[kind] - own

    def total(of: Tensor, value: Tensor) -> Tensor:
        return torch.zeros(unit.numel(), dtype=torch.float64, device=unit.device).index_add(0, of, value.double())

    if unique:
        common, all_of_it = total(sentence, rest > 0), total(sentence, torch.ones_like(own))
        others = total(document, holders[kind].double().reciprocal())[of_document] - total(sentence, rest == 0)[of_sentence]
    else:
        common, all_of_it = total(sentence, own.minimum(rest)), total(sentence, own)
        others = total(document, own)[of_document] - all_of_it[of_sentence]
    return 2 * common[of_sentence] / (all_of_it[of_sentence] + others).round().clamp(min=1)
