"""Questions with given answers, decided by likelihood: multiple choice with and without examples, minimal pairs, facts.

Nothing is generated. Every answer is scored as the continuation of its question, and the likeliest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from headwater import random
from headwater.evaluation.likelihood import Score, causal_log_p
from headwater.evaluation.results import Result, interval
from headwater.hub.backbone import Backbone
from headwater.model import Reader

By = Literal["sum", "token", "byte", "gain"]


class Continuation(NamedTuple):
    """text: what is scored, behind `prefix`, from which white space is not added or taken. given: signals of other modalities."""

    prefix: str
    text: str
    given: Mapping[str, Any] = {}


class Scored(NamedTuple):
    """log_p in nats of `tokens` tokens, of a text of so many UTF-8 bytes."""

    log_p: float
    tokens: int
    bytes: int


class Choice(NamedTuple):
    """A question, its answers as they continue it (mind the space), and which is right."""

    question: str
    options: Sequence[str]
    right: int = 0
    given: Mapping[str, Any] = {}


Ask = Callable[[Sequence[Continuation]], list[Scored]]  # for example partial(continuations, backbone)


def continuations(
    backbone: Backbone,
    asked: Sequence[Continuation],
    score: Score = causal_log_p,
    modality: str = "text",
    end: bool = False,
    rows: int = 32,
) -> list[Scored]:
    """Log p of texts given what stands before them.

    Prefix and text are read as one; scored are the tokens from the first one on that differs from the prefix alone, so that a
    tokenizer may join letters across the seam. score: `partial(causal_log_p, prefix=["image"])` for what is `given`, or
    `pseudo_log_p` for masked models. end: the reader's end mark is scored too. rows: read and scored at a time.
    """
    reader, found = backbone.reader[modality], []
    for one in asked:
        _fits(reader, one)
        if one.given.keys() != asked[0].given.keys():
            raise ValueError(f"found {[*one.given]} given to one text and {[*asked[0].given]} to another; score them apart")
    for start in range(0, len(asked), rows):
        piece = asked[start : start + rows]
        others = {name: [one.given[name] for one in piece] for name in piece[0].given}
        batch = backbone.batch({modality: [one.prefix + one.text for one in piece], **others})
        log_p, ids, lengths = score(backbone.model, batch), batch[modality].x, batch[modality].real().sum(1).tolist()
        for r, one in enumerate(piece):
            last = lengths[r] - (reader.end is not None and not end)
            first = known(reader, one.prefix, ids[r, :last])
            if first >= last:
                raise ValueError(f"found nothing to score in {one.text!r} behind {one.prefix!r}; expected a text")
            found.append(Scored(float(log_p[r, first:last].sum()), last - first, len(one.text.encode())))
    return found


def _fits(reader: Reader, one: Continuation) -> None:
    """A text that was cut would lose what is scored."""
    count, most = getattr(reader, "count", None), getattr(reader, "most", 0)
    if count is not None and (needed := count((one.prefix + one.text).encode()) + reader.marks) > most:  # type: ignore[attr-defined]
        raise ValueError(f"found a text of {needed} tokens where {most} fit ({one.text!r} at its end); shorten its prefix")


def known(reader: Reader, prefix: str, ids: torch.Tensor) -> int:
    """How many of the first ids (N,) are those of the prefix alone."""
    if not prefix.strip():
        return int(getattr(reader, "start", None) is not None)
    before = reader.tokens(prefix).x
    before = (before if reader.end is None else before[:-1])[: len(ids)].to(ids.device)
    return int((before == ids[: len(before)]).long().cumprod(0).sum())


def scores(ask: Ask, items: Sequence[Choice], by: By = "sum", neutral: str = "") -> list[list[float]]:
    """A number per item and option, larger = preferred.

    by: "sum" = log p; "token", "byte" = divided by the length of the option; "gain" = less what the option has behind `neutral`,
    such as "Answer:", so that answers which are likely anywhere win nothing (Brown et al. 2020, arXiv:2005.14165, section 2.4;
    Holtzman et al. 2021, arXiv:2104.08315).
    """
    found = iter(ask([Continuation(i.question, option, i.given) for i in items for option in i.options]))
    if by == "gain":
        alone = iter(ask([Continuation(neutral, option, i.given) for i in items for option in i.options]))
        return [[next(found).log_p - next(alone).log_p for _ in item.options] for item in items]
    per: dict[str, Callable[[Scored], float]] = {
        "sum": lambda s: s.log_p,
        "token": lambda s: s.log_p / s.tokens,
        "byte": lambda s: s.log_p / max(s.bytes, 1),
    }
    if by not in per:
        raise ValueError(f"found by={by!r}; expected sum, token, byte or gain")
    return [[per[by](next(found)) for _ in item.options] for item in items]


def credit(found: Sequence[float], right: int) -> float:
    """1 where the right option is best, a share of it where others are as good, else 0."""
    best = max(found)
    return (found[right] == best) / sum(s == best for s in found)


def rank(found: Sequence[float], right: int) -> float:
    """Place of the right option from 1 on; the mean of their places among those as good."""
    better, equal = sum(s > found[right] for s in found), sum(s == found[right] for s in found)
    return better + (equal + 1) / 2


def accuracy(source: str, items: Sequence[Choice], found: Sequence[Sequence[float]]) -> Result:
    """Share of items whose right option is preferred."""
    hits = np.array([credit(s, item.right) for s, item in zip(found, items, strict=True)])
    chance = float(np.mean([1 / len(item.options) for item in items]))
    return Result(source, "accuracy", float(hits.mean()), *interval(hits), {"chance": chance}, len(hits))


def reciprocal_rank(source: str, items: Sequence[Choice], found: Sequence[Sequence[float]]) -> Result:
    """Mean of 1 / rank of the right option."""
    inverse = np.array([1 / rank(s, item.right) for s, item in zip(found, items, strict=True)])
    chance = float(np.mean([sum(1 / k for k in range(1, len(i.options) + 1)) / len(i.options) for i in items]))
    return Result(source, "reciprocal rank", float(inverse.mean()), *interval(inverse), {"chance": chance}, len(inverse))


def pairs(both: Sequence[tuple[str, str]]) -> list[Choice]:
    """Minimal pairs (good, bad): sentences that differ in what is tested (BLiMP, Warstadt et al. 2019, arXiv:1912.00582)."""
    return [Choice("", pair) for pair in both]


def facts(template: str, table: Mapping[str, str]) -> list[Choice]:
    """A template such as "The capital of {} is" and subject -> object; every object of the table is an option (LAMA, Petroni et al.
    2019, arXiv:1909.01066)."""
    objects = sorted(set(table.values()))
    return [Choice(template.format(a), [f" {o}" for o in objects], objects.index(b)) for a, b in table.items()]


def shots(items: Sequence[Choice], examples: Sequence[Choice], k: int, seed: int = 0, between: str = "\n\n") -> list[Choice]:
    """The same items behind k examples with their right answers, drawn anew for every item; never the item itself."""
    out = []
    for number, item in enumerate(items):
        others = [e for e in examples if (e.question, e.options) != (item.question, item.options)]
        if len(others) < k:
            raise ValueError(f"found {len(others)} examples beside the item {item.question!r}; expected at least k={k}")
        draw = random.uniform_of(random.seed_of(seed, number), (len(others),), "shots")
        chosen = [others[j] for j in np.argsort(draw, kind="stable")[:k]]
        shown = "".join(e.question + e.options[e.right] + between for e in chosen)
        out.append(item._replace(question=shown + item.question))
    return out
