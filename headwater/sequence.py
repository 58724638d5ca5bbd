"""What comes before what when a modality unfolds step by step: one rule for training, for likelihoods and for generation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.tokens import LAST, Tokens


def shift(t: Tokens, start: int | None) -> Tokens:
    """Each place holds the value before it; the first place of a document holds `start`, or zeros for vectors."""
    before = F.pad(t.x, (1, 0) if t.x.ndim == 2 else (0, 0, 1, 0))[:, :-1]
    first = t.place() == 0
    first = first if t.x.ndim == 2 else first[..., None]
    return t._replace(x=torch.where(first, torch.zeros_like(before) if start is None else start, before))


def one_by_one(t: Tokens, step: int) -> Tokens:
    """Makes orders `step` apart and counts the tokens of equal order up within, so that no two see each other.

    step: more than the tokens of any span. Needs `order` to rise along the row.
    """
    order = t.place() if t.order is None else t.order
    span = t._replace(document=(t.sample() << 32) + order)
    return t._replace(order=order * step + span.place())


def unfolding(target: Tokens, prefix: Mapping[str, Tokens], context: Mapping[str, Tokens]) -> tuple[Tokens, dict[str, Tokens]]:
    """Orders under which the target is predicted token by token, and those of all others, prefix first.

    What is known from the beginning (prefix) gets order 0 and sees itself in both directions. What unfolds in step (context)
    keeps its order, so that the target's step t sees it up to t. Where target tokens share an order, such as patches of a
    frame, they come one by one, and the orders of the context are stretched alike.
    """
    others = {name: t._replace(order=torch.zeros_like(t.place())) for name, t in prefix.items()}
    if target.order is None:
        return target, others | dict(context)
    step = target.position.shape[1] + 1
    return one_by_one(target, step), others | {name: t._replace(order=step * orders(t)) for name, t in context.items()}


def orders(t: Tokens) -> Tensor:
    """(B, N) `order`, the place in the document where it is None."""
    return t.place() if t.order is None else t.order


def behind(t: Tokens) -> Tokens:
    """All of a signal behind everything that unfolds: it sees itself and the others, and none of them sees it."""
    return t._replace(order=torch.full_like(t.place(), LAST >> 1))
