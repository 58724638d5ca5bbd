"""Which answers are kept: votes of several, the surest of each class, thoughts by how much they explain. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from headwater import random

Rule = Callable[[Any, dict[str, bytes]], bool]  # what was said, members of the sample -> whether it may stay


class Votes(NamedTuple):
    """Per entry what most of the probability is for, how much of it, and the share of voices that say the same."""

    label: Tensor
    score: Tensor
    agreement: Tensor


def vote(p: Tensor) -> Votes:
    """Probabilities of V voices (V, ..., C) -> (...) each: the class of the largest mean, that mean, the share of voices for it.

    Where a voice says nothing (NaN) the score is NaN.
    """
    score, label = p.mean(0).max(-1)
    return Votes(label, score, (p.argmax(-1) == label).to(p.dtype).mean(0))


def plurality(said: Sequence[Hashable], score: Sequence[float]) -> tuple[int, float]:
    """Place of the answer that is taken, and the share of voices that gave it (self-consistency, Wang et al., arXiv:2203.11171).

    Of answers as frequent the one with the larger sum of scores; of its voices the one with the largest score.
    """
    sums: dict[Hashable, tuple[int, float]] = {}
    for one, s in zip(said, score, strict=True):
        count, total = sums.get(one, (0, 0.0))
        sums[one] = count + 1, total + s
    winner = max(sums, key=sums.__getitem__)
    best = max((k for k, one in enumerate(said) if one == winner), key=lambda k: score[k])
    return best, sums[winner][0] / len(said)


def surest(score: Sequence[float], group: Sequence[Hashable], share: float = 1.0, most: int | None = None) -> np.ndarray:
    """(S,) True for the best share of each group, at least one, and at most `most` of it; of equal scores the first.

    With classes as groups: class-balanced self-training (Zou et al. 2018, arXiv:1810.07911), and as many per class
    as Noisy Student takes (Xie et al. 2019, arXiv:1911.04252).
    """
    kept, places = np.zeros(len(score), bool), dict[Hashable, list[int]]()
    for place in np.argsort(-np.asarray(score, np.float64), kind="stable").tolist():
        places.setdefault(group[place], []).append(place)
    for inside in places.values():
        count = max(1, round(share * len(inside)))
        kept[inside[: count if most is None else min(count, most)]] = True
    return kept


def importance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(..., K) shares of K thoughts z ~ q(. | x): p(z, x) / q(z | x), scaled to sum 1. log_p: of z and x; log_q: of z given x.

    The E-step of EM over what is hidden (Ruan et al. 2025, arXiv:2503.18866).
    """
    return (log_p - log_q).softmax(-1)


def evidence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(...) log of the mean of p(z, x) / q(z | x) over K thoughts (..., K): below log p(x) on average, and nearer with more of
    them (Burda et al. 2015, arXiv:1509.00519)."""
    return (log_p - log_q).logsumexp(-1) - float(np.log(log_p.shape[-1]))


def resampled(share: Tensor, seed: Tensor) -> Tensor:
    """(S,) one of K for each row, drawn by its shares (S, K). seed: (S,)."""
    return (share.log() + random.gumbel(seed, (share.shape[-1],), "resampled")).argmax(-1)


@dataclass
class Keep:
    """Which answers are kept; each condition narrows down what the ones before it left.

    Args:
        score: the least score: mean probability of a label over voices, or per token of a text.
        agreement: the least share of voices that say the same.
        shortest: fewest characters of a text.
        longest: most characters of a text; none = any number.
        pattern: a regular expression that is found in what was said.
        rule: dotted path of an own function: (what was said, members of the sample as {extension: bytes}) -> whether it stays.
        share: of each class, the surest; texts are one class.
        most: of each class, so many of the surest; none = all. Classes that are alike in size are what unbiased students need.
    """

    score: float = 0.0
    agreement: float = 0.0
    shortest: int = 0
    longest: int | None = None
    pattern: str = ""
    rule: Rule | None = None
    share: float = 1.0
    most: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.score <= 1 and 0 <= self.agreement <= 1 and 0 < self.share <= 1):
            raise ValueError(
                f"found score {self.score}, agreement {self.agreement}, share {self.share}; expected 0 to 1, and a share above 0"
            )
        if (self.most is not None and self.most < 1) or not 0 <= self.shortest <= (self.longest or self.shortest):
            raise ValueError(
                f"found most {self.most}, shortest {self.shortest} and longest {self.longest}; expected 1 or more per class, and "
                "at least as many characters at most as at least"
            )
        pattern(self.pattern)

    def refuses(self, value: Any, score: float, agreement: float, members: dict[str, bytes]) -> str:
        """The condition that one answer does not meet, "" where it meets all that look at it alone."""
        words = str(value)
        if not score >= self.score:
            return "score"
        if agreement < self.agreement:
            return "agreement"
        if len(words) < self.shortest or (self.longest is not None and len(words) > self.longest):
            return "length"
        if not re.search(self.pattern, words):
            return "pattern"
        return "rule" if self.rule is not None and not self.rule(value, members) else ""

    def among(self, score: Sequence[float], group: Sequence[Hashable]) -> np.ndarray:
        """(S,) True for those that are kept of all that met the other conditions."""
        return surest(score, group, self.share, self.most)


def pattern(words: str) -> re.Pattern[str]:
    """A regular expression; ValueError for what is none."""
    try:
        return re.compile(words)
    except re.error as error:
        raise ValueError(f"found {words!r}; expected a regular expression: {error}") from error
