"""Documents in which modalities take turns: which place holds what, and what it is asked for, in one causal order of all.

A document is a row of spans, maximal runs of one modality. Each span begins at a place that holds the start value of its
modality, goes on with its values, and ends at a place that holds the last one and asks for nothing, so that what follows sees
all of it. One rule for training, for likelihoods and for generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.sequence import orders
from headwater.tokens import Tokens, cat


class Turn(NamedTuple):
    """Of every token of one modality, (B, N). order: of the place that asks for it, the place behind it has one more; first,
    last: of its span."""

    order: Tensor
    first: Tensor
    last: Tensor


def turns(parts: Sequence[Tokens], back: Tensor | None = None) -> list[Turn]:
    """Where each token comes in its document, with a free place behind every span.

    Tokens go by `order`, equal ones by the number of their part. If no part has an order, the parts come one after the other, in
    samples that are `back` (S,) the last one first. Within a part `order` must not fall along the row.
    """
    whole = cat([_entered(t, number, back, all(p.order is None for p in parts)) for number, t in enumerate(parts)])
    index = whole.order.argsort(dim=1, stable=True)  # type: ignore[union-attr]
    for key in (whole.sample(), ~whole.real()):
        index = index.gather(1, key.gather(1, index).argsort(dim=1, stable=True))
    sorted_keys = torch.stack([field.gather(1, index) for field in (whole.x, whole.sample(), whole.real().long())])
    begins = (sorted_keys[..., 1:] != sorted_keys[..., :-1]).any(0)
    first, last = F.pad(begins, (1, 0), value=True), F.pad(begins, (0, 1), value=True)
    order = torch.arange(first.shape[1], device=first.device) + first.cumsum(1) - 1
    found = [torch.empty_like(field).scatter_(1, index, field) for field in (order, first, last)]
    lengths = [t.position.shape[1] for t in parts]
    return [Turn(*fields) for fields in zip(*(field.split(lengths, 1) for field in found), strict=True)]


def _entered(t: Tokens, number: int, back: Tensor | None, plain: bool) -> Tokens:
    """With the number of the part as x, and an order."""
    x = torch.full_like(t.sample(), number)
    turn = x if back is None else torch.where(back[t.sample()], -x, x)
    return t._replace(x=x, order=turn if plain else orders(t))


def opened(t: Tokens, at: Turn, asked: Tensor, start: int | None) -> tuple[Tokens, Tokens]:
    """Places that ask, and what they are asked for, valid where they are: (B, N) -> twice (B, N + C), C the most spans of a row.

    Each place holds the value before it in its span, the first one `start`, or zeros for vectors. The one behind a span asks for
    nothing; it lies one further along coordinate 0, at zero of the others. asked: (B, N) True = count this token.
    """
    value = F.pad(t.x, (1, 0) if t.x.ndim == 2 else (0, 0, 1, 0))[:, :-1]
    first = at.first if t.x.ndim == 2 else at.first[..., None]
    held = torch.where(first, torch.zeros_like(value) if start is None else start, value)
    behind = F.pad(t.position[..., :1] + 1, (0, t.position.shape[-1] - 1))

    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], 2).flatten(1, 2)

    sample = None if t.document is None else both(t.document, t.document)
    places = Tokens(both(held, t.x), both(t.position, behind), None, sample, both(at.order, at.order + 1))
    kept = both(t.real(), t.real() & at.last)
    column = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(int(kept.sum(1).max()), 1)]
    kept = kept.gather(1, column)
    asked = both(asked, torch.zeros_like(asked)).gather(1, column)
    return places.take(column, kept), places._replace(x=both(t.x, t.x)).take(column, asked)


def before(parts: Mapping[str, Tokens], starts: Mapping[str, int | None]) -> tuple[dict[str, Tokens], Tensor]:
    """Known spans as a model that learned documents wants to see them, and (B,) how many places they take.

    What is generated behind them goes on from that order. parts: without `order`, in the order in which they come; one sample
    per row. starts: `Encoder.start` of each.
    """
    found = {}
    for (name, t), at in zip(parts.items(), turns([*parts.values()]), strict=True):
        found[name] = opened(t, at, t.real(), starts[name])[0]
    count = torch.stack([t.real().sum(1) for t in found.values()]).sum(0)
    return found, count
