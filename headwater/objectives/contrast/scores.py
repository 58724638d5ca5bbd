"""How alike two samples are: what contrastive losses compare.

A score is asked in blocks of samples, so that its matrix of all pairs never has to exist as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.model import Model
from headwater.objectives.heads import Projector
from headwater.objectives.objective import wide
from headwater.tokens import Pooled, Tokens

Items = tuple[Tensor, ...]  # what a score needs of S samples: tensors (S, ...), in the order of their numbers


class Score(nn.Module):
    """Scores of all pairs of two modalities, or of two views of one. Built as `Score(model, names)`.

    `vectors` runs piece by piece of the batch, `items` on all samples of the rank (so heads may normalise over the batch and
    over ranks), `forward` on any rows of this rank beside any columns of all ranks. Items travel between ranks; dimensions behind
    the first may differ over ranks and are filled up with zeros (False).

    like: items of no sample, (0, ...), which say what a queue has to hold; None = their size varies, and there is no queue.
    symmetric: score(a, b) is the transpose of score(b, a), so that one matrix serves both directions.
    extra: names of what `terms` returns.
    """

    like: Items | None = None
    symmetric: bool = True
    extra: tuple[str, ...] = ()

    def vectors(self, model: Model, name: str, t: Tokens) -> Pooled:
        """Contextual tokens of one modality, before fusion -> one vector per sample, or several (`sample` repeats, rising).

        Every sample that has a real token has at least one vector. Default: the pooled vector in the shared space.
        """
        return model.pool(name, t)

    def items(self, name: str, vectors: Pooled) -> Items:
        """All vectors of this rank -> what `forward` wants of each sample, (S, ...) in the order of `vectors.sample.unique()`."""
        raise NotImplementedError(f"{type(self).__name__}.items must say what is compared")

    def forward(self, a: Items, b: Items) -> Tensor:
        """Items of A and of B samples -> (A, B) scores, larger = more alike. A score depends on its own two samples alone."""
        raise NotImplementedError(f"{type(self).__name__}.forward must score all pairs")

    def cost(self, a: Items, b: Items) -> int:
        """How many numbers exist while one score is made, so that tiles of many scores keep to their memory."""
        return 1

    def terms(self, a: Items, b: Items, every_a: Items, every_b: Items) -> dict[str, tuple[Tensor, float]]:
        """What a score wants beside the contrast: name -> (sum over this rank's pairs, weight).

        a, b: items of the S pairs of this rank; every_a, every_b: of all ranks. The keys are the same in every batch.
        """
        return {}


class Cosine(Score):
    """The cosine of pooled vectors.

    Args:
        model: gives pooled vectors, of equal size unless heads make them so (`space` of the model).
        names: modalities, or views of them.
        head: sizes of a projector behind the pooled vector, one for each modality, thrown away after training; None = none
            (Chen et al. 2020, SimCLR, arXiv:2002.05709). norm: between its layers.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        head: Sequence[int] | None = None,
        norm: Literal["batch", "layer", "none"] = "batch",
    ) -> None:
        super().__init__()
        dims = {name.partition("@")[0]: model.dim(name) for name in names}
        if head is None and len(set(dims.values())) > 1:
            raise ValueError(
                f"pooled vectors have different sizes, {dims}; expected the same: give the model a shared space, "
                "for example `space: 128`"
            )
        made = {name: Projector([dim, *head], norm) for name, dim in dims.items()} if head else {}
        self.heads: Any = nn.ModuleDict(made)
        self.like = (torch.empty(0, head[-1] if head else model.dim(names[0])),)

    def items(self, name: str, vectors: Pooled) -> Items:
        """-> ((S, D) unit vectors,), in float32 at least."""
        x = self.heads[name.partition("@")[0]](vectors.x) if self.heads else vectors.x
        return (F.normalize(wide(x), dim=-1),)

    def forward(self, a: Items, b: Items) -> Tensor:
        return a[0] @ b[0].T


class Detached:
    """A score that positives ask, without owning its parameters. Its items must be of one size, as facts are.

    like: items of no sample.
    """

    def __init__(self, score: Score) -> None:
        if score.like is None:
            raise ValueError(
                f"{type(score).__name__} compares sets of different sizes, which these positives cannot keep; take one that "
                "compares one vector per sample, such as Cosine"
            )
        self.score, self.like = score, score.like

    @torch.no_grad()
    def __call__(self, a: Items, b: Items) -> Tensor:
        """Items of A and C samples -> (A, C), without gradient."""
        return self.score(a, b)
