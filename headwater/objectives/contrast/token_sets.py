"""Scores between two sets of tokens: every word looks for its patch.

A sample is the set of its contextual tokens, each projected into the model's shared space and made a unit vector, so that the
exported backbone scores as it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.model import Model
from headwater.objectives.contrast.scores import Items, Score
from headwater.objectives.objective import wide
from headwater.tokens import Pooled, Tokens, earlier


class TokenSets(Score):
    """What scores between sets share: the unit vectors of a sample's tokens, filled up to the longest.

    One score takes the cosines of all pairs of both samples' tokens, so tiles hold fewer scores.

    Args:
        model: has a shared `space`.
        names: modalities, or views of them.
        merge: tokens of a sample are averaged in groups of so many neighbours first, which saves the square of it; 1 = none.
    """

    def __init__(self, model: Model, names: Sequence[str], merge: int = 1) -> None:
        super().__init__()
        if odd := [n for n in names if model.space is None or model.encoder(n).dim != model.encoder(n).width]:
            raise ValueError(
                f"tokens of {', '.join(odd)} have no way into a shared space; expected a model with, for example, `space: 128` "
                "and encoders whose tokens are as wide as their pooled vector"
            )
        if merge < 1:
            raise ValueError(f"found merge {merge}; expected 1 (every token counts) or more")
        self.merge = merge

    def cost(self, a: Items, b: Items) -> int:
        return max(1, a[0].shape[1] * b[0].shape[1])

    def vectors(self, model: Model, name: str, t: Tokens) -> Pooled:
        """Contextual tokens (B, N, D) -> the real ones that came with the signal, (T, space), sample by sample in their order."""
        kept = t.real() & t.given()
        x, sample = t.x[kept], t.sample()[kept]
        if self.merge > 1:
            group = sample * t.position.shape[1] + t.place()[kept] // self.merge
            found, number, count = group.unique(return_inverse=True, return_counts=True)
            x = x.new_zeros(len(found), x.shape[-1]).index_add(0, number, x) / count[:, None].to(x.dtype)
            sample = found // t.position.shape[1]
        by_sample = sample.argsort(stable=True)
        return Pooled(model.projections[name.partition("@")[0]](x[by_sample]), sample[by_sample])

    def items(self, name: str, vectors: Pooled) -> Items:
        """-> (unit vectors (S, L, D), in float32 at least, 0 where L is more than the sample has; which are real (S, L))."""
        x = wide(vectors.x)
        _, row, count = vectors.sample.unique(return_inverse=True, return_counts=True)
        place = earlier(row)
        shape = len(count), int(count.max()) if len(count) else 0
        units = x.new_zeros(*shape, x.shape[-1]).index_put((row, place), F.normalize(x, dim=-1))
        return units, place.new_zeros(shape, dtype=torch.bool).index_put((row, place), place.new_ones((), dtype=torch.bool))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Unit vectors (A, L, D), (B, M, D) -> (A, B, L, M)."""
    return (a.flatten(0, 1) @ b.flatten(0, 1).T).view(*a.shape[:2], *b.shape[:2]).transpose(1, 2)


def best(cosine: Tensor, asks: Tensor, answers: Tensor, top: int) -> Tensor:
    """For each token of A the mean of its `top` largest cosines with tokens of B, summed: (A, B, L, M) -> (A, B).

    asks: (A, L), answers: (B, M), True = a real token. Where B has fewer than `top` tokens, the mean is over all.
    """
    hidden = cosine.masked_fill(~answers[:, None], -torch.inf)
    if top == 1:
        found = hidden.amax(-1)
    else:
        value = hidden.topk(min(top, hidden.shape[-1]), dim=-1).values
        held = value > -torch.inf
        found = torch.where(held, value, 0.0).sum(-1) / held.sum(-1).clamp(min=1)
    return found.masked_fill(~asks[:, None], 0.0).sum(-1)


class LateInteraction(TokenSets):
    """Every token of one side finds the most similar token of the other; their cosines are averaged or summed.

    ColBERT (Khattab and Zaharia 2020, arXiv:2004.12832: a query asks a document, sum) and FILIP (Yao et al. 2021,
    arXiv:2111.07783: whoever is the row asks, mean).

    Args:
        model, names, merge: see TokenSets.
        query: the modality that asks in both directions of the loss; None = the rows of each direction do.
        reduce: over the tokens that ask. A sum wants a temperature that is larger by their number.
        top: mean of so many best cosines instead of the best one.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        query: str | None = None,
        reduce: Literal["mean", "sum"] = "mean",
        top: int = 1,
        merge: int = 1,
    ) -> None:
        super().__init__(model, names, merge)
        if query is not None and query not in names:
            raise ValueError(f"found query {query}, but {' and '.join(names)} are compared; name one of them")
        if top < 1:
            raise ValueError(f"found top {top}; expected 1 (the best token alone) or more")
        self.query, self.reduce, self.top, self.symmetric = query, reduce, top, query is not None

    def items(self, name: str, vectors: Pooled) -> Items:
        """Beside the tokens: (S,) how much a sample's own questions count."""
        x, real = super().items(name, vectors)
        return x, real, x.new_full((len(x),), float(self.query is None or name == self.query))

    def forward(self, a: Items, b: Items) -> Tensor:
        cosine = cosines(a[0], b[0])
        score = self._asked(cosine, a[1], b[1])
        if self.query is None:
            return score
        back = self._asked(cosine.transpose(-1, -2).transpose(0, 1), b[1], a[1]).T
        return a[2][:, None] * (1 - b[2]) * score + (1 - a[2])[:, None] * b[2] * back

    def _asked(self, cosine: Tensor, asks: Tensor, answers: Tensor) -> Tensor:
        total = best(cosine, asks, answers, self.top)
        return total / asks.sum(1).clamp(min=1)[:, None].to(total.dtype) if self.reduce == "mean" else total


class Transport(TokenSets):
    """The mean cosine under the cheapest plan that carries all tokens of one side to those of the other, each weighing the same.

    Entropic optimal transport by Sinkhorn's iteration (Cuturi 2013, arXiv:1306.0895); between words and patches as in UNITER
    (Chen et al. 2019, arXiv:1909.11740). The plan is a constant in the gradient, as the envelope theorem has it for the optimal
    one. Symmetric: each iteration scales the two sides together, half way, so that neither goes first.

    Args:
        model, names, merge: see TokenSets.
        entropy: how soft the plan is, in units of the cosine.
        steps: of Sinkhorn's iteration.
    """

    def __init__(self, model: Model, names: Sequence[str], entropy: float = 0.1, steps: int = 10, merge: int = 1) -> None:
        super().__init__(model, names, merge)
        if entropy <= 0 or steps < 1:
            raise ValueError(f"found entropy {entropy} and steps {steps}; expected more than 0 and at least 1")
        self.entropy, self.steps = entropy, steps

    def forward(self, a: Items, b: Items) -> Tensor:
        cosine = cosines(a[0], b[0])
        return (plan(cosine.detach(), a[1], b[1], self.entropy, self.steps) * cosine).sum((-1, -2))


@torch.no_grad()
def plan(cosine: Tensor, a: Tensor, b: Tensor, entropy: float, steps: int) -> Tensor:
    """(A, B, L, M) masses that sum to 1, in rows to 1 / tokens of A and in columns to 1 / tokens of B, near enough.

    cosine: (A, B, L, M); a: (A, L), b: (B, M), True = a real token.
    """
    log = (cosine / entropy).masked_fill(~(a[:, None, :, None] & b[None, :, None, :]), -torch.inf)
    want_a = -a.sum(1).clamp(min=1).to(log.dtype).log()[:, None, None]
    want_b = -b.sum(1).clamp(min=1).to(log.dtype).log()[None, :, None]
    f, g = torch.zeros_like(log[..., 0]), torch.zeros_like(log[..., 0, :])
    for _ in range(steps):
        new_f = want_a - (log + g[..., None, :]).logsumexp(-1).clamp(min=-1e4)
        new_g = want_b - (log + f[..., None]).logsumexp(-2).clamp(min=-1e4)
        f, g = (f + new_f) / 2, (g + new_g) / 2
    mass = (log + f[..., None] + g[..., None, :]).exp()
    return mass / mass.sum((-1, -2), keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
