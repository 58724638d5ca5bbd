"""A model asked for one place after the other, with everything in the order in which it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headwater.cache import Cache
from headwater.model import Model
from headwater.sequence import orders, shift, unfolding
from headwater.tokens import Tokens, cat


def cacheable(model: Model, names: Sequence[str]) -> bool:
    """Whether causal passes in which these modalities unfold may come piece by piece, with the same answers."""
    return all(model.encoder(name).cacheable for name in names) and (model.fusion is None or model.fusion.cacheable)


class Stepwise:
    """Answers of a model for the places of a canvas, each given the values before it.

    With a cache each token is computed once. Models for which that is not exact see everything again at every step.

    Args:
        model: in evaluation mode.
        name: the modality that unfolds.
        canvas: (B, N) its places; the values are not read.
        prefix, context: prepared Tokens of what is known from the beginning, and of what unfolds in step; (B, ...) each.
        lead: tokens of the same modality that stand before the canvas and are known from the beginning, with order 0.
        mutual: (B,) how many of the first places see each other, as those of a prefix do.
        cached: False = see everything again, True = only where it is exact.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        canvas: Tokens,
        prefix: Mapping[str, Tokens],
        context: Mapping[str, Tokens],
        lead: Tokens | None = None,
        mutual: Tensor | None = None,
        cached: bool = True,
    ) -> None:
        self.model, self.name, self.encoder = model, name, model.encoder(name)
        self.places, self.others = unfolding(canvas, prefix, context)
        self.lead, even = lead, True
        if mutual is not None:
            order = orders(self.places)
            self.places = self.places._replace(order=torch.where(self.places.place() < mutual[:, None], 0, order))
            even = bool((mutual == mutual[0]).all())  # else some rows would see what follows only later
        self.cache = Cache() if cached and even and cacheable(model, [name, *context]) else None
        self.done = 0  # places that have been asked for

    def ask(self, x: Tensor) -> Tensor:
        """Values so far, (B, n) ids or (B, n, F), for n places -> logits (B, V) or values (B, F) of place n."""
        place = x.shape[1]
        t = shift(self.places._replace(x=torch.cat([x, self.places.x[:, place:].to(x.dtype)], 1)), self.encoder.start)
        if self.encoder.pointwise:  # else the places behind tell where this one lies; their values reach nothing
            t = t.map(lambda field: field[:, : place + 1])
        if self.cache is None:
            y = self._answer({**self.others, self.name: t}, place, self.lead)
        else:
            new = t._replace(order=orders(t)).map(lambda field: field[:, self.done :])
            with self.cache:
                y = self._answer({**self._due(place), self.name: new}, place - self.done, None if self.done else self.lead)
        self.done = place + 1
        return self.encoder.unembed(y)

    def _answer(self, parts: dict[str, Tokens], at: int, lead: Tokens | None) -> Tensor:
        """What the model makes of place `at` of the modality, (B, D), with what leads it in front."""
        if lead is not None:
            parts, at = {**parts, self.name: cat([lead, parts[self.name]])}, at + lead.position.shape[1]
        return self.model(self.model.embed(parts), True)[self.name].x[:, at]

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, (B',) of the B so far."""
        self.places = self.places.map(lambda field: field[rows])
        self.others = {name: t.map(lambda field: field[rows]) for name, t in self.others.items()}
        self.lead = None if self.lead is None else self.lead.map(lambda field: field[rows])
        if self.cache is not None:
            self.cache.take(rows)

    def _due(self, place: int) -> dict[str, Tokens]:
        """The tokens of the others that come into sight at this place, and were not in sight before."""
        order, due = orders(self.places), {}
        now = order[:, place, None]
        before = order[:, self.done - 1, None] if self.done else torch.full_like(now, -1)
        for name, t in self.others.items():
            own = orders(t)
            fresh = (own > before) & (own <= now)
            if bool(fresh.any()):
                columns = fresh.any(0).nonzero()[:, 0]
                piece, fresh = columns_of(t._replace(order=own), columns), fresh[:, columns]
                due[name] = piece if bool(fresh.all()) else piece._replace(valid=piece.real() & fresh)
        return due


def columns_of(t: Tokens, columns: Tensor) -> Tokens:
    """The tokens (B, K) at these columns (K,)."""
    return t.map(lambda field: field[:, columns])


class Guided:
    """Answers moved by what is known beside: u + scale (c - u), with c asked with it and u without.

    Ho and Salimans 2022, arXiv:2207.12598; for language models Sanchez et al. 2023, arXiv:2306.17806.
    """

    def __init__(self, known: Stepwise, free: Stepwise, scale: float) -> None:
        self.known, self.free, self.scale = known, free, scale

    def ask(self, x: Tensor) -> Tensor:
        """As `Stepwise.ask`."""
        without = self.free.ask(x)
        return without + self.scale * (self.known.ask(x) - without)

    def take(self, rows: Tensor) -> None:
        """As `Stepwise.take`."""
        self.known.take(rows)
        self.free.take(rows)
