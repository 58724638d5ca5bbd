"""Ways to make (source, target) of a document: what is corrupted, and what is asked for.

Each takes Tokens whose documents are unbroken runs of real tokens, and gives parts of the same layout in which tokens that are
not real are left out (`tokens.concat` closes the gaps). Together both always tell the whole document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.objectives.masks.policies import Policy, ascending, lengths, number, smallest
from headwater.objectives.noise.operators import Ids, Infill, Noise, Permute, before, shares
from headwater.objectives.objective import Schedule, at
from headwater.tokens import Tokens


class Pair(NamedTuple):
    """What is seen and what is asked for, (B, M) each."""

    source: Tokens
    target: Tokens


class Denoiser:
    """Subclasses have plain values only, so recipes can spell them out.

    mode: the number among the reader's extra ids of the token that tells the model which task this is; it stands first in the
    source. None = none. ended: the source, too, ends with the end mark of the document.
    """

    mode: int | None = None
    ended: bool = True

    def marks(self, length: int) -> int:
        """How many extra ids documents of up to so many tokens take, beside modes."""
        return 0

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Pair:
        """t.x: (B, N) ids, without end marks; seed: (S,) of the samples."""
        raise NotImplementedError(f"{type(self).__name__} must return a source and a target")


class SpanCorruption(Denoiser):
    """Hides spans: mark k stands for span k in the source, and before it in the target (T5, Raffel et al. 2019, arXiv:1910.10683).

    Of N tokens round(rate * N) are hidden in round(rate * N / mean) spans, as random_spans_noise_mask of
    https://github.com/google-research/text-to-text-transfer-transformer does, which however hides the end of every document; here
    a span may lie anywhere, for short documents have but one. UL2 (Tay et al. 2022, arXiv:2205.05131) has rate 0.15 with means 3
    and 8 (R), and rate 0.5 or mean 64 (X). A document of one token is hidden whole. Where there are fewer marks than spans, there
    are fewer spans, and as many hidden tokens.

    Args:
        rate: share of each document's tokens that are hidden; a number or a schedule over the run.
        mean: tokens per span.
        policy: which tokens are hidden, whole words for example; neighbours form a span, and those for which no mark is left stay
            seen. None = spans of this mean.
        mode: see Denoiser.
    """

    def __init__(
        self, rate: float | Schedule = 0.15, mean: float = 3.0, policy: Policy | None = None, mode: int | None = None
    ) -> None:
        if mean < 1:
            raise ValueError(f"found mean {mean}; expected 1 or more tokens per span")
        if policy is not None and policy.score is not None:
            raise ValueError(f"found {type(policy).__name__}, which asks the model before it hides; expected another policy")
        self.rate, self.mean, self.policy, self.mode = shares("rate", rate), mean, policy, mode

    def marks(self, length: int) -> int:
        return max(1, round(at(self.rate, 0.0) * length / self.mean)) if self.policy is None else 1

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Pair:
        rate = at(self.rate, progress)
        own = self.policy
        hidden = own(t, seed, rate, "spans") if own else spans(t, seed, rate, self.mean, len(ids.marks))
        return marked(t, hidden, ids.marks)


def spans(t: Tokens, seed: Tensor, rate: float, mean: float, most: int) -> Tensor:
    """(B, N) True = hidden, in at most so many spans that do not touch: all choices of lengths and places are equally likely.

    The places of a document are dealt out: the first V to what is seen, the other H to what is hidden. H is cut into K spans, and
    these go into K of the V + 1 gaps between the tokens that are seen.
    """
    length = lengths(t, len(seed))
    hide = number(length, rate)
    count = (rate * length / mean).round().clamp(1, most).minimum(hide).minimum(length - hide + 1)
    place, seen = t.place(), (length - hide)[t.sample()]
    late, draw = place >= seen, random.uniform(random.token_seed(seed, t), (), "spans")
    gap = smallest(t, draw.masked_fill(place > seen, math.inf), count)
    cut = smallest(t, draw.masked_fill(place <= seen, math.inf), count - 1)
    turn = torch.where(late, 2 * (before(t, cut.long()) + cut) + 1, 2 * (before(t, gap.long()) + gap))
    return late.gather(1, ascending(t, turn.double())[0]) & t.real()


def marked(t: Tokens, hidden: Tensor, marks: Sequence[int]) -> Pair:
    """Runs of hidden tokens (B, N) go to the target, each behind a mark of its own that stays in the source."""
    run = hidden & (~F.pad(hidden, (1, 0))[:, :-1] | (t.place() == 0))
    turn = (before(t, run.long()) + run - 1).clamp(min=0)  # the number of the run, from its first token on
    hidden = hidden & (turn < len(marks))
    run = run & hidden
    mark = torch.tensor(list(marks), device=t.x.device)[turn.clamp(max=len(marks) - 1)]
    source = t._replace(x=torch.where(run, mark, t.x), valid=t.real() & (run | ~hidden))
    return Pair(source, interleaved(t._replace(x=mark, valid=run), t._replace(valid=hidden)))


def interleaved(a: Tokens, b: Tokens) -> Tokens:
    """(B, 2N): each token of a before that of b."""
    pairs = (None if x is None or y is None else torch.stack([x, y], 2).flatten(1, 2) for x, y in zip(a, b, strict=True))
    return Tokens(*pairs)  # type: ignore[arg-type]


class Prefix(Denoiser):
    """The beginning is seen, and the rest is asked for (prefix language model; the S-denoiser of UL2, arXiv:2205.05131).

    Args:
        rate: the least and the largest share of a document that is asked for, at least one token: (0, 1) = the split is anywhere,
            (0.25, 0.25) as UL2 has it, (1, 1) = all is asked for, which is causal prediction.
        mode: see Denoiser.
    """

    ended = False  # what follows is not over

    def __init__(self, rate: tuple[float, float] = (0.0, 1.0), mode: int | None = None) -> None:
        if not 0 <= rate[0] <= rate[1] <= 1:
            raise ValueError(f"found rate {rate}; expected the least and the largest share, from 0 to 1")
        self.rate, self.mode = rate, mode

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Pair:
        length, (low, high) = lengths(t, len(seed)), self.rate
        share = low + (high - low) * random.uniform(seed, (), "prefix")
        seen = length - (share * length).round().clamp(min=1)
        asked = t.real() & (t.place() >= seen[t.sample()])
        return Pair(t._replace(valid=t.real() & ~asked), t._replace(valid=asked))


class Reconstruction(Denoiser):
    """The source is noised, and the whole document is asked for (BART, Lewis et al. 2019, arXiv:1910.13461).

    Args:
        noise: operators, one after the other; None = BART's: sentences change places, then spans of 30 % are filled in.
        mode: see Denoiser.
    """

    def __init__(self, noise: list[Noise] | None = None, mode: int | None = None) -> None:
        self.noise, self.mode = [Permute(), Infill()] if noise is None else noise, mode

    def marks(self, length: int) -> int:
        return max((noise.marks for noise in self.noise), default=0)

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Pair:
        source = t
        for turn, noise in enumerate(self.noise):  # two of a kind draw anew
            source = noise(source, random.fold(seed, turn), ids, progress)
        return Pair(source, t)
