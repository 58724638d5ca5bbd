"""Contrast between parts of signals: an object in two views, a phrase and what it names, a moment and the next one.

Each region is the mean of the contextual tokens inside of it, and is told apart from all other regions of its sample and of the
batch of all ranks. Regions come from labels that follow the views of a signal, or are moments: tokens of one time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.model import Model, Reader
from headwater.objectives.contrast.losses import Loss, Softmax
from headwater.objectives.contrast.positives import Target
from headwater.objectives.contrast.tiles import tiled
from headwater.objectives.heads import Projector
from headwater.objectives.objective import Batch, Objective, Term, viewed
from headwater.tokens import Pooled, Tokens
from headwater.view import View


class Places(NamedTuple):
    """Whose regions they are and which. sample: (R,) its number, rising; number: (R,) of the object or the moment."""

    sample: Tensor
    number: Tensor


def moments(t: Tokens, span: float) -> tuple[Places, Tensor]:
    """Regions of `span` of coordinate 0 -> which there are (R,), and of each kept token which it is in (T,), row by row.

    Tokens that came with the signal are kept.
    """
    kept = t.real() & t.given()
    time = (t.position[kept][:, 0].double() / span).floor().long()
    low = time.min() if len(time) else 0
    width = (time.max() - low + 1) if len(time) else 1
    found, inside = (t.sample()[kept] * width + time - low).unique(return_inverse=True)
    return Places(found // width, found % width + low), inside


def labelled(regions: Tokens, t: Tokens) -> tuple[Places, Tensor]:
    """Regions that a reader names and that hold tokens of t -> which there are (R,), and their row and column (R, 2)."""
    place = (overlap(regions, t).sum(-1) > 0).nonzero()
    sample, number = (field[place[:, 0], place[:, 1]] for field in (regions.sample(), regions.position[..., 0]))
    order = sample.argsort(stable=True)
    return Places(sample[order], number[order].long()), place[order]


def overlap(regions: Tokens, t: Tokens) -> Tensor:
    """(B, R, N) how much of each token lies in each region of its sample; 0 for tokens that did not come with the signal.

    regions.x: (B, R, 4) boxes (left, top, right, bottom), from 0 to 1 of the grid that coordinates 1 and 2 (row, column) count; or
    (B, R, 2) first and one past the last of coordinate 0.
    """
    kept = t.real() & t.given()
    mine = (regions.sample()[:, :, None] == t.sample()[:, None]) & regions.real()[:, :, None] & kept[:, None]
    box, place = regions.x[:, :, None], t.position[:, None].to(regions.x.dtype)
    if box.shape[-1] == 2:
        inside = (place[..., 0] >= box[..., 0]) & (place[..., 0] < box[..., 1])
        return (inside & mine).to(box.dtype)
    total = box.new_ones(mine.shape)
    for axis, (low, high) in ((2, (0, 2)), (1, (1, 3))):
        size = torch.where(mine, place[..., axis] + 1, 0.0).amax(-1, keepdim=True).clamp(min=1)
        ends = (box[..., high] * size).minimum(place[..., axis] + 1), (box[..., low] * size).maximum(place[..., axis])
        total = total * (ends[0] - ends[1]).clamp(min=0)
    return total * mine


def answers(rows: Places, columns: Places, near: float, apart: bool) -> Tensor:
    """(A, C) shares that sum to 1 per row: regions of the row's sample, of its number (near 0) or by exp(-d^2 / (2 near^2)).

    d is the difference of numbers, at most 3 near; apart: the region itself is no answer. Rows without any answer are 0.
    """
    away = (rows.number[:, None] - columns.number).double()
    weight = (-(away / near).square() / 2).exp() * (away.abs() <= 3 * near) if near else (away == 0).double()
    weight = weight * (rows.sample[:, None] == columns.sample) * ((away != 0) if apart else 1)
    return weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def answered(rows: Places, columns: Places, near: float, apart: bool) -> Tensor:
    """(A,) whether a row has any answer, without the matrix of all pairs."""
    reach = int(3 * near)
    numbers = torch.cat([rows.number, columns.number, rows.number.new_zeros(1)])
    low = numbers.min() - reach
    width = numbers.max() - low + reach + 1
    mine, theirs = (place.sample * width + place.number - low for place in (rows, columns))
    return torch.stack([torch.isin(mine + d, theirs) for d in range(-reach, reach + 1) if d or not apart]).any(0)


class Regions(Objective):
    """Hides which region of one side belongs to which of the other.

    Masks or boxes through two views: DetCon (Henaff et al. 2021, arXiv:2103.10957). Moments of one film, where neighbours in time
    are answers and all others are wrong: TCN (Sermanet et al. 2017, arXiv:1704.06888) and R3M (Nair et al. 2022, arXiv:2203.12601).

    Args:
        model: its encoders' contextual tokens are averaged, before fusion.
        a, b: modalities or views of them; the same twice compares the moments of one signal with each other, without itself.
        regions: reader of the regions of a or b, such as {image@0: Boxes(follows="image@0"), image@1: ...}; of spans of a text
            by `Numbers` of two lists (first, one past the last). Others have moments. A label's position is the object's number.
        span: length of a moment, in units of coordinate 0.
        near: answers have the same number, or, above 0, numbers that are about so far away.
        negatives: regions of all samples of the "batch", or of the "sample" alone (near ones that are wrong are the hard ones).
        head: sizes of the projector behind a region's mean, one per modality.
        loss: of the matrix of cosines.
        views: how random views among a and b are made; one that is not named here is the reader's own.
        tile: scores that exist at once.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        a: str = "video",
        b: str = "video",
        regions: dict[str, Reader] | None = None,
        span: float = 1.0,
        near: float = 1.0,
        negatives: Literal["batch", "sample"] = "batch",
        head: Sequence[int] = (64,),
        loss: Callable[[], Loss] = Softmax,
        views: dict[str, View] | None = None,
        tile: int = 1 << 23,
    ) -> None:
        super().__init__()
        self.names = tuple(dict.fromkeys((a, b)))
        self.same = a == b
        if stray := set(regions or {}) - set(self.names):
            raise ValueError(f"found regions of {sorted(stray)}; compared are {' and '.join(self.names)}")
        if span <= 0 or near < 0:
            raise ValueError(f"found span {span} and near {near}; expected a span above 0 and near of 0 or more")
        if self.same and 3 * near < 1:
            raise ValueError(f"found {a} compared with itself and near {near}; expected 1/3 or more: other moments are its answers")
        if odd := [name for name, reader in (regions or {}).items() if reader.features not in (2, 4)]:
            raise ValueError(f"the regions of {odd[0]} have neither 4 numbers (Boxes) nor 2 (first, one past the last)")
        self.views = viewed(self.names, views)
        self.readers = {f"regions/{name}": reader for name, reader in (regions or {}).items()}
        self.needs = (*self.names, *self.readers)
        self.span, self.near, self.negatives, self.tile = span, near, negatives, tile
        widths = {name.partition("@")[0]: model.encoder(name).width for name in self.names}
        self.heads: Any = nn.ModuleDict({name: Projector([width, *head], "layer") for name, width in widths.items()})
        self.loss = loss()

    def places(self, batch: Batch, name: str) -> Places:
        """The regions of one side."""
        key = f"regions/{name}"
        return labelled(batch[key], batch[name])[0] if key in self.readers else moments(batch[name], self.span)[0]

    def kept(self, batch: Batch) -> list[tuple[str, str, Tensor]]:
        """Rows, candidates, and which of the rows have an answer (R,), of each direction."""
        place = {name: self.places(batch, name) for name in self.names}
        pairs = [(self.names[0], self.names[-1]), (self.names[-1], self.names[0])][: len(self.names)]
        return [(r, c, answered(place[r], place[c], self.near, self.same)) for r, c in pairs]

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"regions": torch.stack([has.sum() for _, _, has in self.kept(batch)]).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        found = model.in_pieces(lambda piece: self.average(model, piece), {name: batch[name] for name in self.needs})
        unit = {name: F.normalize(self.heads[name.partition("@")[0]](v.x).to(v.x.dtype), dim=-1) for name, v in found.items()}
        before = sum(distributed.lengths(len(batch["seed"]), batch["seed"].device)[: distributed.rank()])
        totals, number = [], batch["seed"].new_zeros(())
        for rows, columns, has in self.kept(batch):
            mine, other = (Places(p.sample + before, p.number) for p in (self.places(batch, rows), self.places(batch, columns)))
            every, known = distributed.gather(unit[columns])[0], Places(*(distributed.gather(field)[0] for field in other))
            totals.append(self.score(unit[rows][has], Places(*(field[has] for field in mine)), every, known))
            number = number + has.sum()
        return {"regions": Term(torch.stack(totals).sum(), number, metrics=self.loss.metrics())}

    def average(self, model: Model, piece: dict[str, Tokens]) -> dict[str, Pooled]:
        """The mean of the contextual tokens of every region."""
        made = {}
        for name, t in model.encode(model.embed({name: piece[name] for name in self.names})).items():
            if f"regions/{name}" in piece:
                regions = piece[f"regions/{name}"]
                part, (place, at) = overlap(regions, t).to(t.x.dtype), labelled(regions, t)
                mean = (part @ t.x) / part.sum(-1, keepdim=True).clamp(min=1e-6)
                made[name] = Pooled(mean[at[:, 0], at[:, 1]], place.sample)
            else:
                place, inside = moments(t, self.span)
                total = t.x.new_zeros(len(place.sample), t.x.shape[-1]).index_add(0, inside, t.x[t.real() & t.given()])
                count = inside.bincount(minlength=len(place.sample)).clamp(min=1)
                made[name] = Pooled(total / count[:, None].to(total.dtype), place.sample)
        return made

    def score(self, unit: Tensor, mine: Places, every: Tensor, known: Places) -> Tensor:
        """Sum over rows (A, D) of their loss beside all candidates (C, D)."""

        def block(unit: Tensor, *place: Tensor) -> Tensor:
            logits, rows = self.loss.logits(unit @ every.T), Places(*place)
            t = answers(rows, known, self.near, self.same).to(logits.dtype)
            own = rows.sample[:, None] == known.sample
            out = own & (rows.number[:, None] == known.number) if self.same else torch.zeros_like(own)
            out = out if self.negatives == "batch" else out | ~own
            return self.loss.rows(logits, Target(t, torch.zeros_like(logits).masked_fill(out, -torch.inf)))

        return self.loss.total(torch.cat(tiled(block, (unit, *mine), len(every), self.tile)))

    def after_step(self, model: Model, progress: float) -> None:
        self.loss.after_step()
