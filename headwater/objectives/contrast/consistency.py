"""Similarities that agree within and across modalities, beside any contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater.model import Model
from headwater.objectives.contrast.scores import Cosine, Items, Score
from headwater.tokens import Pooled, Tokens


class Consistent(Score):
    """Another score, with two terms: what two pictures have in common, their texts have; and i with text j what j with text i.

    CyCLIP (Goel et al. 2022, arXiv:2205.14459, equations 3 and 4; https://github.com/goel-shashank/CyCLIP): the mean over pairs i
    of the sums over j of (S(a_i, a_j) - S(b_i, b_j))^2 and of (S(a_i, b_j) - S(a_j, b_i))^2, over all ranks, without temperature.

    Args:
        model, names: handed on.
        score: what is compared.
        within, across: weights of the two terms.
        tile: rows that are compared at once.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        score: Callable[[Model, Sequence[str]], Score] = Cosine,
        within: float = 0.25,
        across: float = 0.25,
        tile: int = 1024,
    ) -> None:
        super().__init__()
        self.score = score(model, names)
        self.like, self.symmetric = self.score.like, self.score.symmetric
        self.extra = (*self.score.extra, "within", "across")
        self.within, self.across, self.tile = within, across, tile

    def vectors(self, model: Model, name: str, t: Tokens) -> Pooled:
        return self.score.vectors(model, name, t)

    def items(self, name: str, vectors: Pooled) -> Items:
        return self.score.items(name, vectors)

    def forward(self, a: Items, b: Items) -> Tensor:
        return self.score(a, b)

    def cost(self, a: Items, b: Items) -> int:
        return self.score.cost(a, b)

    def terms(self, a: Items, b: Items, every_a: Items, every_b: Items) -> dict[str, tuple[Tensor, float]]:
        """ "within" and "across", beside the terms of the score."""
        tiles = zip(*(x.split(self.tile) for x in (*a, *b)), strict=True)
        within, across = torch.stack([self._tile(rows, every_a, every_b) for rows in tiles]).sum(0)
        found = {"within": (within, self.within), "across": (across, self.across)}
        return {**self.score.terms(a, b, every_a, every_b), **found}

    def _tile(self, rows: Items, every_a: Items, every_b: Items) -> Tensor:
        """(2,) both sums over some rows; backward computes their scores again."""

        def sums(*rows: Tensor) -> Tensor:
            a, b = rows[: len(every_a)], rows[len(every_a) :]
            within, across = self.score(a, every_a) - self.score(b, every_b), self.score(a, every_b) - self.score(b, every_a)
            return torch.stack([within.square().sum(), across.square().sum()])

        return checkpoint(sums, *rows, use_reentrant=False)  # type: ignore[return-value]
