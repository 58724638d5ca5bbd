"""Which tokens are hidden: policies for sequences, grids, films and tables, all by coordinates and places, for packed rows too.

A policy gives every token a key; of each document those with the smallest keys are hidden, exactly as many as the ratio asks
for. Draws come from the seed of the sample, a name, and the token's place or coordinates.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.tokens import Tokens


def lengths(t: Tokens, samples: int) -> Tensor:
    """(S,) float32: how many real tokens each sample has."""
    count = torch.zeros(samples, device=t.position.device)
    return count.index_add(0, t.sample().flatten(), t.real().flatten().float())


def number(length: Tensor, ratio: float | Tensor) -> Tensor:
    """How many of n tokens are hidden: round(ratio * n), at least one, and of two or more at most all but one.

    Ratios from 1 on hide all, ratios up to 0 none. length: (S,) -> (S,).
    """
    ratio = torch.as_tensor(ratio, dtype=length.dtype, device=length.device)
    most = torch.where(length > 1, length - 1, length)
    some = (ratio * length).round().clamp(min=1).minimum(most)
    return torch.where(ratio >= 1, length, torch.where(ratio <= 0, 0, some))


def ascending(t: Tokens, key: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, N) of the tokens by document, then by key, and their rank there. Equal keys keep their order.

    Tokens that are not real come last in their document.
    """
    order = key.masked_fill(~t.real(), math.inf).argsort(dim=1, stable=True)
    if t.document is not None:
        order = order.gather(1, t.document.gather(1, order).argsort(dim=1, stable=True))
    return order, t._replace(document=None if t.document is None else t.document.gather(1, order)).place()


def smallest(t: Tokens, key: Tensor, count: Tensor) -> Tensor:
    """(B, N) True = among the `count` real tokens of its document with the smallest keys. key: (B, N); count: (S,)."""
    order, rank = ascending(t, key)
    return (torch.empty_like(rank).scatter_(1, order, rank) < count[t.sample()]) & t.real()


class Columns(NamedTuple):
    """Some of the N tokens of every row, in order: column (B, K), and which of these K are meant; None = all."""

    column: Tensor
    real: Tensor | None


def indices(chosen: Tensor, count: int | None = None) -> Columns:
    """Where the chosen tokens (B, N) are. count: every row has so many, which costs no wait for the device and needs no mask."""
    width = max(int(chosen.sum(1).max()), 1) if count is None else count
    column = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return Columns(column, chosen.gather(1, column) if count is None else None)


class Policy:
    """Subclasses give keys; they have plain values only, so recipes can spell them out.

    exact: documents of equal length lose equally many tokens, whatever their seeds.
    score: what the policy wants to know of each token from the model; None = nothing.
    """

    exact: bool = True
    score: Literal["attention", "loss"] | None = None

    def __call__(self, t: Tokens, seed: Tensor, ratio: float | Tensor, name: str = "mask", score: Tensor | None = None) -> Tensor:
        """(B, N) True = hidden. seed: (S,) of the samples; ratio: one, or (S,); score: (B, N) where the policy wants one."""
        return smallest(t, self.key(t, seed, name, score), number(lengths(t, len(seed)), ratio))

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        """(B, N) float: small ones are hidden first."""
        raise NotImplementedError(f"{type(self).__name__}.key must give a number per token")


class Uniform(Policy):
    """Every token is as likely as any other."""

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        return random.uniform(random.token_seed(seed, t), (), name)


class Spans(Policy):
    """Runs of neighbours: random starts, one after the other, each with all of its span, until there are enough.

    Spans may overlap, as in wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477: fixed, mean 10); the last one is cut. SpanBERT
    (Joshi et al. 2019, arXiv:1907.10529) has geometric lengths of mean 5, none above 10.

    Args:
        mean: tokens per span, before clipping.
        most: the longest span.
        fixed: all spans have `mean` tokens, a whole number; else lengths are geometric.
    """

    def __init__(self, mean: float = 5.0, most: int = 10, fixed: bool = False) -> None:
        if mean < 1 or most < 1 or (fixed and mean != int(mean)):
            raise ValueError(f"found mean {mean}, most {most}, fixed {fixed}; expected 1 or more, and a whole mean with `fixed`")
        self.mean, self.most, self.fixed = mean, int(mean) if fixed else most, fixed

    def lengths(self, draw: Tensor) -> Tensor:
        """Draws in [0, 1) -> lengths: P(n) = (1 - 1/mean)^(n - 1) / mean, then clipped."""
        if self.fixed or self.mean == 1:
            return torch.full_like(draw, self.mean)
        return (1 + torch.floor(torch.log1p(-draw) / math.log1p(-1 / self.mean))).clamp(max=self.most)

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        seeds, place = random.token_seed(seed, t), t.place()
        start, length = random.uniform(seeds, (), name), self.lengths(random.uniform(seeds, (), f"{name}/length"))
        key = start
        for far in range(1, min(self.most, start.shape[1])):
            before, reach = (F.pad(field[:, :-far], (far, 0)) for field in (start, length))
            key = torch.where((reach > far) & (place >= far), key.minimum(before), key)
        return key


class Blocks(Policy):
    """Boxes on the grid of coordinates, one random box after the other, until there are enough; the last one is cut.

    BEiT (Bao et al. 2021, arXiv:2106.08254) with its aspects; along the axes that are left out a box has no end, so that on
    films boxes are tubes (V-JEPA, Bardes et al. 2024, arXiv:2404.08471). What no box reaches is hidden one by one.

    Args:
        share: range of a box's share of the grid.
        aspect: range of length along the first axis over that along each other.
        axes: coordinates that boxes are bounded in: [1, 2] rows and columns, [0, 1] time and frequency of a sound.
        tries: boxes that are drawn.
    """

    def __init__(
        self,
        share: tuple[float, float] = (0.1, 0.3),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        axes: list[int] | None = None,
        tries: int = 16,
    ) -> None:
        if not 0 < share[0] <= share[1] <= 1 or not 0 < aspect[0] <= aspect[1] or tries < 1:
            raise ValueError(f"found share {share}, aspect {aspect}, tries {tries}; expected rising positive ranges, share up to 1")
        self.share, self.aspect, self.axes, self.tries = share, aspect, axes or [1, 2], tries

    def boxes(self, low: Tensor, extent: Tensor, seed: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """First cell and size, (S, tries, A) each, of boxes within grids that begin at `low` (S, A) and have `extent` cells."""
        draw = random.uniform(seed, (self.tries, 2, low.shape[1]), name)
        small, large = self.share
        volume = (small + (large - small) * draw[:, :, 0, :1]) * extent.prod(-1)[:, None, None]
        narrow, wide = math.log(self.aspect[0]), math.log(self.aspect[1])
        bend = F.pad(-(narrow + (wide - narrow) * draw[:, :, 0, 1:]), (1, 0))
        size = (volume.log() / low.shape[1] + bend - bend.mean(-1, keepdim=True)).exp()
        size = size.round().clamp(min=1).minimum(extent[:, None])
        return low[:, None] + (draw[:, :, 1] * (extent[:, None] - size + 1)).floor(), size

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        place = coordinates(t, self.axes)
        low, high = (bounds(t, place, len(seed), side) for side in ("amin", "amax"))
        corner, size = (field[t.sample()] for field in self.boxes(low, high - low + 1, seed, name))
        inside = ((place[:, :, None] >= corner) & (place[:, :, None] < corner + size)).all(-1)  # (B, N, tries)
        alone = self.tries + random.uniform(random.token_seed(seed, t), (), f"{name}/alone")
        return torch.where(inside.any(-1), inside.to(torch.uint8).argmax(-1).to(alone.dtype), alone)


class Around(Policy):
    """One region: the tokens nearest to one that is drawn. On clouds of points the block of Point-BERT (arXiv:2111.14819).

    Args:
        axes: coordinates whose Euclidean distance counts; None = all.
    """

    def __init__(self, axes: list[int] | None = None) -> None:
        self.axes = axes

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        place = coordinates(t, self.axes)
        one = torch.ones(len(seed), device=place.device)
        chosen = smallest(t, random.uniform(random.token_seed(seed, t), (), name), one)
        centre = place.new_zeros(len(seed), place.shape[-1])
        centre = centre.index_add(0, t.sample().flatten(), (place * chosen[..., None]).flatten(0, 1))
        return (place - centre[t.sample()]).square().sum(-1)


class Units(Policy):
    """Whole units, never parts: the tokens of a sample that share some coordinates are hidden and kept together.

    axes [1, 2] on films: tubes, the same cells at all times (VideoMAE, Tong et al. 2022, arXiv:2203.12602). On sounds [0] hides
    strips of time and [1] strips of frequency; on series [1] whole channels, on tables [1] columns.

    The unit that would exceed the ratio is hidden with the probability that makes the ratio right on average. Of several units
    at least one is hidden and one kept; a sample that is one unit is hidden with the probability `ratio`.

    Args:
        axes: the coordinates that a unit shares; None = their `order` (the steps of a film, with all that belongs to one).
    """

    exact = False

    def __init__(self, axes: list[int] | None = None) -> None:
        self.axes = axes

    def units(self, t: Tokens) -> list[Tensor]:
        """Numbers (B, N) that are equal, all of them, where two tokens of a sample are of one unit."""
        if self.axes is None:
            return [t.place() if t.order is None else t.order]
        return [*coordinates(t, self.axes).long().unbind(-1)]

    def __call__(self, t: Tokens, seed: Tensor, ratio: float | Tensor, name: str = "mask", score: Tensor | None = None) -> Tensor:
        own = seed[t.sample()]
        for part in self.units(t):
            own = random.fold(own, part)
        key = random.uniform(own, (), name)
        order, rank = ascending(t, key)
        own, sample = own.gather(1, order), t.sample().gather(1, order)
        starts = F.pad((own[:, 1:] != own[:, :-1]) | (sample[:, 1:] != sample[:, :-1]), (1, 0), value=True)
        unit, real = starts.cumsum(1) - 1, t.real().gather(1, order)
        size = torch.zeros_like(key).scatter_add(1, unit, real.to(key.dtype)).gather(1, unit)
        before = rank - t._replace(document=unit).place()
        length = lengths(t, len(seed))[sample]
        wanted = torch.as_tensor(ratio, device=key.device).expand(len(seed))[sample] * length
        hidden = random.uniform(own, (), f"{name}/last") < (wanted - before) / size
        several = size < length
        hidden = torch.where(several, (hidden | (before == 0)) & ((before + size < length) | (wanted >= length)), hidden)
        return torch.empty_like(hidden).scatter_(1, order, hidden & (wanted > 0)) & t.real()


class Words(Units):
    """Whole words of a text of bytes, characters or sub-words (whole-word masking of BERT, github.com/google-research/bert).

    Args:
        starts: ids that begin a word. [32], the space, for bytes: a word has the space before it.
    """

    def __init__(self, starts: list[int]) -> None:
        if not starts:
            raise ValueError("found no ids in starts; expected those that begin a word, such as [32], the space of bytes")
        super().__init__()
        self.starts = starts

    def units(self, t: Tokens) -> list[Tensor]:
        word = torch.isin(t.x, torch.tensor(self.starts, device=t.x.device)).cumsum(1)
        first = torch.arange(word.shape[1], device=word.device) - t.place()
        return [word - word.gather(1, first)]


class Suffix(Policy):
    """The end of every document, by its `order`: what comes is predicted from what was."""

    def key(self, t: Tokens, seed: Tensor, name: str, score: Tensor | None) -> Tensor:
        return -(t.place() if t.order is None else t.order).float()


def coordinates(t: Tokens, axes: list[int] | None) -> Tensor:
    """(B, N, A) float: the coordinates of these axes, or of all."""
    if axes is not None and (not axes or max(axes) >= t.position.shape[-1]):
        raise ValueError(f"found axes {axes} and tokens of {t.position.shape[-1]} coordinates; expected numbers below that")
    return (t.position if axes is None else t.position[..., axes]).float()


def bounds(t: Tokens, place: Tensor, samples: int, side: Literal["amin", "amax"]) -> Tensor:
    """(S, A): the smallest or largest coordinates of each sample's real tokens; 0 where it has none. place: (B, N, A)."""
    far = math.inf if side == "amin" else -math.inf
    index = t.sample().flatten()[:, None].expand(-1, place.shape[-1])
    start = place.new_full((samples, place.shape[-1]), far)
    found = start.scatter_reduce(0, index, place.masked_fill(~t.real()[..., None], far).flatten(0, 1), side)
    return found.masked_fill(found.isinf(), 0)
