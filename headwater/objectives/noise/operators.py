"""Noise on ids: tokens are deleted, inserted, replaced, blanked or moved, document by document, each sample by its own seed.

Operators take Tokens as `tokens.concat` lays them out, documents by their numbers and each an unbroken run of real tokens, and
return such. A token keeps its position, which so tells the place that it came from; what was inserted has position -1. So
operators can follow one another, and what is left of a document can be put back. Numbers of tokens are rate * N, rounded up or
down by a draw, so that short documents meet the rate on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.objectives.masks.policies import ascending, lengths, smallest
from headwater.objectives.objective import Schedule, at
from headwater.tokens import Tokens, cat

ENDS = (33, 46, 63, 10)  # of sentences, in bytes: ! . ? and a new line


class Ids(NamedTuple):
    """vocab: texts are made of the ids below it. marks: ids that no text has; the first one is the mask of `Infill`."""

    vocab: int
    marks: range


def start_of(t: Tokens) -> Tensor:
    """(B, N) the column in which the document of each token begins."""
    return torch.arange(t.position.shape[1], device=t.position.device) - t.place()


def before(t: Tokens, amount: Tensor) -> Tensor:
    """(B, N) the sum of `amount` over the tokens of the same document that stand before each."""
    total = amount.cumsum(1) - amount
    return total - total.gather(1, start_of(t))


def arrange(t: Tokens, key: Tensor) -> Tokens:
    """The real tokens of each document by key (B, N), equal keys in the order in which they stood; what is not real behind them."""
    return t.take(ascending(t, key.double())[0])._replace(order=None)


def joined(parts: Sequence[Tokens], keys: Sequence[Tensor]) -> Tokens:
    """Parts (B, N_i) as one, (B, sum of N_i), by keys across all of them."""
    return arrange(cat([t._replace(valid=t.real(), order=None) for t in parts]), torch.cat(list(keys), 1))


def some(amount: Tensor, seed: Tensor, name: str) -> Tensor:
    """(S,) numbers as whole ones, rounded up as often as their fraction says."""
    return (amount + random.uniform(seed, (), f"{name}/number")).floor()


def chosen(t: Tokens, among: Tensor, seed: Tensor, rate: float, name: str) -> Tensor:
    """(B, N) True = drawn from those that are `among` (B, N): of each document the share `rate` of them."""
    count = some(rate * lengths(t._replace(valid=among), len(seed)), seed, name)
    draw = random.uniform(random.token_seed(seed, t), (), name)
    return smallest(t, draw.masked_fill(~among, math.inf), count)


def sentences(t: Tokens, ends: Sequence[int]) -> Tensor:
    """(B, N) number of the sentence within the document: one ends behind the last of neighbouring `ends`."""
    end = torch.isin(t.x, torch.tensor(ends, device=t.x.device))
    over = F.pad(end, (1, 0))[:, :-1] & ~end & (t.place() > 0)
    return before(t, over.long()) + over


def begins(t: Tokens, unit: Tensor) -> Tensor:
    """(B, N) True = the first token of its unit. unit: (B, N) numbers that rise along the document."""
    return t.real() & ((F.pad(unit, (1, 0))[:, :-1] != unit) | (t.place() == 0))


def beginning(begins: Tensor) -> Tensor:
    """(B, N) the column of the last token up to each that begins a unit."""
    return torch.where(begins, torch.arange(begins.shape[1], device=begins.device), 0).cummax(1).values


class Noise:
    """Changes the ids of documents. Subclasses have plain values only, so recipes can spell them out.

    marks: how many ids of `Ids.marks` it puts.
    """

    marks: int = 0

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        """t.x: (B, N) ids; seed: (S,) of the samples; progress: of the run, for schedules -> (B, M)."""
        raise NotImplementedError(f"{type(self).__name__} must return the changed tokens")


class Delete(Noise):
    """Tokens vanish (BART, Lewis et al. 2019, arXiv:1910.13461, section 2.2).

    Args:
        rate: share of each document's tokens; a number or a schedule over the run.
    """

    def __init__(self, rate: float | Schedule = 0.1) -> None:
        self.rate = shares("rate", rate)

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        gone = chosen(t, t.real(), seed, at(self.rate, progress), "delete")
        return arrange(t._replace(valid=t.real() & ~gone), t.place())


class Insert(Noise):
    """Random ids appear before random tokens.

    Args:
        rate: how many, as a share of each document's tokens; a number or a schedule over the run.
    """

    def __init__(self, rate: float | Schedule = 0.1) -> None:
        self.rate = shares("rate", rate)

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        here = chosen(t, t.real(), seed, at(self.rate, progress), "insert")
        new = (random.uniform(random.token_seed(seed, t), (), "insert/id") * ids.vocab).long()
        return joined([added(t, new, here), t], [t.place(), t.place()])


def added(t: Tokens, x: Tensor | int, here: Tensor) -> Tokens:
    """Tokens (B, N) that are real where `here` is True and came from nowhere."""
    return t._replace(x=x + torch.zeros_like(t.x), position=torch.full_like(t.position, -1), valid=here)


class Replace(Noise):
    """Tokens become others: any id, or one that a table has for them (a dictionary, words of the same cluster, misspellings).

    Args:
        rate: share of each document's tokens that are replaced, of those that the table has; a number or a schedule.
        table: id -> the ids that may take its place, each as likely as any other; None = any id for any.
    """

    def __init__(self, rate: float | Schedule = 0.1, table: dict[int, list[int]] | None = None) -> None:
        self.rate = shares("rate", rate)
        if table is not None and not (table and all(table.values())):
            raise ValueError("found a table that is empty or has an id without any other; expected {id: [ids that replace it]}")
        self.table = table

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        draw = random.uniform(random.token_seed(seed, t), (), "replace/id")
        if self.table is None:
            new, known = (draw * ids.vocab).long(), t.real()
        else:
            new, known = looked_up(self.table, t.x, draw)
            known &= t.real()
        here = chosen(t, known, seed, at(self.rate, progress), "replace")
        return t._replace(x=torch.where(here, new, t.x))


def looked_up(table: dict[int, list[int]], x: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """What the table has for ids x (B, N), by draws (B, N) in [0, 1), and where it has anything."""
    keys = sorted(table)
    count = torch.tensor([len(table[key]) for key in keys], device=x.device)
    flat = torch.tensor([other for key in keys for other in table[key]], device=x.device)
    keys_there = torch.tensor(keys, device=x.device)
    row = torch.searchsorted(keys_there, x).clamp(max=len(keys) - 1)
    first = count.cumsum(0) - count
    return flat[first[row] + (draw * count[row]).long()], keys_there[row] == x


class Shuffle(Noise):
    """Tokens change places with near ones; none moves further than the window (Lample et al. 2017, arXiv:1711.00043, section 2.3).

    Args:
        window: k; token i is sorted by i + a draw from [0, k + 1).
    """

    def __init__(self, window: int = 3) -> None:
        if window < 1:
            raise ValueError(f"found window {window}; expected 1 or more places that a token may move")
        self.window = window

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        draw = random.uniform(random.token_seed(seed, t), (), "shuffle")
        return arrange(t, t.place() + draw.double() * (self.window + 1))


class Permute(Noise):
    """Sentences, or runs of n tokens, change places among themselves; inside of them nothing moves.

    Sentences: BART's permutation; runs: the shuffled n-grams of SPBERT (Tran et al. 2021, arXiv:2106.09997).

    Args:
        rate: share of a document's units that change places; a number or a schedule over the run.
        size: n tokens per unit; None = sentences.
        ends: ids that end a sentence; None = those of `! . ?` and a new line in bytes.
    """

    def __init__(self, rate: float | Schedule = 1.0, size: int | None = None, ends: Sequence[int] | None = None) -> None:
        self.rate = shares("rate", rate)
        if (size is not None and size < 1) or (size is not None and ends is not None):
            raise ValueError(f"found size {size} and ends {ends}; expected a size of 1 or more, or the ids that end sentences")
        self.size, self.ends = size, ENDS if ends is None else tuple(ends)

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        unit = sentences(t, self.ends) if self.size is None else t.place() // self.size
        head = begins(t, unit)
        here = chosen(t, head, seed, at(self.rate, progress), "permute")
        moving = t._replace(valid=here)
        draw = random.uniform(random.token_seed(seed, t), (), "permute/order")
        drawn, placed = ascending(moving, draw)[0], ascending(moving, t.place().double())[0]
        seat = unit.scatter(1, drawn, unit.gather(1, placed))  # of the units that move; others stay
        seat = torch.where(here, seat, unit)
        return arrange(t, seat.gather(1, beginning(head)))


class Rotate(Noise):
    """Documents begin at a random token, and what stood before it follows at the end (BART's document rotation).

    Args:
        rate: share of the documents; a number or a schedule over the run.
    """

    def __init__(self, rate: float | Schedule = 1.0) -> None:
        self.rate = shares("rate", rate)

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        length = lengths(t, len(seed)).long()
        begin = (random.uniform(seed, (), "rotate") * length).long()
        begin = torch.where(random.uniform(seed, (), "rotate/which") < at(self.rate, progress), begin, 0)
        return arrange(t, (t.place() - begin[t.sample()]) % length.clamp(min=1)[t.sample()])


class Infill(Noise):
    """Spans become one mask each, whatever their length; a span of length 0 is a mask where nothing is missing (BART).

    Lengths are from a Poisson distribution, one span after the other until there are enough tokens; the last one is cut.

    Args:
        rate: share of each document's tokens that are hidden; a number or a schedule over the run.
        mean: of the lengths.
    """

    marks = 1

    def __init__(self, rate: float | Schedule = 0.3, mean: float = 3.0) -> None:
        if mean <= 0:
            raise ValueError(f"found mean {mean}; expected a mean length above 0")
        self.rate, self.mean = shares("rate", rate), mean

    def __call__(self, t: Tokens, seed: Tensor, ids: Ids, progress: float = 0.0) -> Tokens:
        seeds, length = random.token_seed(seed, t), lengths(t, len(seed))
        wanted = some(at(self.rate, progress) * length, seed, "infill")
        size = poisson(random.uniform(seeds, (), "infill/size"), self.mean)
        left = wanted[t.sample()] - before(t, size)
        spans = t._replace(valid=t.real() & (left > 0))
        size = torch.where(spans.real(), size.minimum(left), 0)
        gap = (random.uniform(seeds, (), "infill/gap") * (length - wanted + 1)[t.sample()]).floor()
        order = ascending(spans, gap)[0]
        gap, size, there = gap.gather(1, order), size.gather(1, order), spans.real().gather(1, order)
        begin = torch.where(there, gap + before(t, size), 0)  # in the order of the gaps, which is that of the document
        hidden = covered(start_of(t) + begin, size)
        masks = added(t, ids.marks[0], there)
        return joined([masks, t._replace(valid=t.real() & ~hidden)], [begin, t.place()])


def poisson(draw: Tensor, mean: float) -> Tensor:
    """Draws in [0, 1) -> whole numbers, float32, of a Poisson distribution; the tail beyond 10 deviations is cut."""
    most = int(mean + 10 * math.sqrt(mean)) + 2
    chance = torch.tensor([math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(most)], device=draw.device)
    return torch.searchsorted(chance.cumsum(0), draw, right=True).to(draw.dtype)


def covered(begin: Tensor, size: Tensor) -> Tensor:
    """(B, N) True = inside of one of the spans that begin at columns (B, N), each of some size (B, N); none overlap."""
    step = torch.zeros(len(begin), begin.shape[1] + 1, device=begin.device)
    real = (size > 0).to(step.dtype)
    step = step.scatter_add(1, begin.long(), real).scatter_add(1, (begin + size).long(), -real)
    return step.cumsum(1)[:, :-1] > 0


def shares(name: str, value: float | Schedule) -> float | Schedule:
    """The value, if it is a share."""
    if not 0 <= at(value, 0.0) <= 1:
        raise ValueError(f"found {name} {at(value, 0.0)}; expected a share from 0 to 1")
    return value
