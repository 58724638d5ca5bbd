"""How good sampled generations are: estimators over several samples of each prompt, scorers, and samples that can be scored again.

`drawn` asks a model several times with seeds of their own, `write` stores what came, `table` scores it, now or years later.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headwater import random
from headwater.evaluation.results import Result, interval


class Generation(NamedTuple):
    """One sample of a prompt. reference: what would be right, where there is one. seed: of the call that made it."""

    prompt: str
    text: str
    reference: str = ""
    seed: int = 0


Generate = Callable[[Sequence[str], int], Sequence[str]]  # prompts, seed -> one text each
Scorer = Callable[[Generation], float]


def drawn(generate: Generate, prompts: Sequence[str], n: int, seed: int = 0, references: Sequence[str] = ()) -> list[Generation]:
    """n samples per prompt, those of a prompt side by side; sample k of every prompt comes from one call."""
    seeds = [random.seed_of(seed, k) for k in range(n)]
    calls = [generate(prompts, s) for s in seeds]
    right = references or [""] * len(prompts)
    return [Generation(p, calls[k][i], right[i], s) for i, p in enumerate(prompts) for k, s in enumerate(seeds)]


def write(generations: Sequence[Generation], path: str | Path) -> None:
    """One line of JSON each."""
    Path(path).write_text("".join(json.dumps(g._asdict(), ensure_ascii=False) + "\n" for g in generations), encoding="utf-8")


def read(path: str | Path) -> list[Generation]:
    """What `write` stored."""
    return [Generation(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def table(
    source: str, generations: Sequence[Generation], scorers: Mapping[str, Scorer], k: int = 1, threshold: float = 0.5
) -> list[Result]:
    """Per scorer the mean score, the largest of k samples, and how often one of k reaches the threshold. Prompts are resampled.

    Neighbours of one prompt belong together; k is at most the number of samples of every prompt.
    """
    groups = [list(group) for _, group in groupby(generations, key=lambda g: (g.prompt, g.reference))]
    found = []
    for name, scorer in scorers.items():
        scores = [[scorer(g) for g in group] for group in groups]
        measures = {
            name: [float(np.mean(s)) for s in scores],
            f"{name} best of {k}": [expected_max(s, k) for s in scores],
            f"{name} once in {k}": [pass_at_k(len(s), sum(x >= threshold for x in s), k) for s in scores],
        }
        found += [Result(source, m, float(np.mean(v)), *interval(np.array(v)), {}, len(v)) for m, v in measures.items()]
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k samples is right, when `right` of n are: 1 - C(n - right, k) / C(n, k), without bias (Chen et al. 2021,
    arXiv:2107.03374)."""
    _enough(n, k)
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def expected_max(scores: Sequence[float], k: int) -> float:
    """Mean of the largest score over all choices of k of the samples (expected maximum toxicity, Gehman et al. 2020,
    arXiv:2009.11462): the i-th smallest is largest in C(i - 1, k - 1) of the C(n, k)."""
    _enough(len(scores), k)
    return sum(s * math.comb(i, k - 1) for i, s in enumerate(sorted(scores))) / math.comb(len(scores), k)


def _enough(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"found {n} samples of a prompt and k={k}; expected k from 1 to the number of samples")


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n neighbours."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all of them; 1 = nothing comes twice (Li et al. 2015, arXiv:1510.03055)."""
    every = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(every)) / max(len(every), 1)


def copied(text: str, source: str, n: int = 1) -> float:
    """Share of the n-grams of words of a text that its source has (copying ratio, Liu et al. 2021, arXiv:2107.08212)."""
    made, known = ngrams(text.split(), n), set(ngrams(source.split(), n))
    return sum(gram in known for gram in made) / max(len(made), 1)


def coverage(texts: Sequence[str], valid: Sequence[str]) -> float:
    """Share of the valid outputs that were sampled at least once."""
    return len(set(valid) & set(texts)) / len(set(valid))


def divergence(texts: Sequence[str], target: Mapping[str, float]) -> float:
    """KL(sampled || target) in nats of how often each text came; infinite where one came that the target never gives.

    n samples of the target itself have about (number of outputs - 1) / 2n.
    """
    count, total = Counter(texts), len(texts)
    if not all(target.get(text, 0) > 0 for text in count):
        return math.inf
    return sum(c / total * math.log(c / total / target[text]) for text, c in count.items())


def exact(g: Generation) -> float:
    """1 where the text is the reference, but for white space at both ends."""
    return float(g.text.strip() == g.reference.strip())


def from_prompt(g: Generation) -> float:
    """Share of the words that the prompt has."""
    return copied(g.text, g.prompt)


def interrupted(question: str, trace: str, share: float, demand: str, update: str = "") -> str:
    """A prompt that stops a trace of reasoning after this share of its words, tells an update, and demands the answer (Wu et al.
    2025, arXiv:2510.11713). With share 1 and no update the trace is whole, to the letter."""
    if not 0 <= share <= 1:
        raise ValueError(f"found share {share}; expected 0 (no trace) to 1 (all of it)")
    ends = [0, *(i for i, letter in enumerate(trace) if letter.isspace() and i and not trace[i - 1].isspace()), len(trace)]
    return question + trace[: ends[round(share * (len(ends) - 1))]] + update + demand


def exchanged(histories: Sequence[str], seed: int = 0) -> list[str]:
    """Every history given to another one's owner: the control for conditioning on it."""
    if len(histories) < 2:
        raise ValueError(f"found {len(histories)} histories; expected two or more, so that none keeps its own")
    order = np.argsort(random.uniform_of(seed, (len(histories),), "exchanged"), kind="stable")
    given = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [histories[given[i]] for i in range(len(histories))]
