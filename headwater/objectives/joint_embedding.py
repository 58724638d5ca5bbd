"""Joint embedding without negatives and without a teacher: views of a sample, or its modalities, get one embedding.

What keeps it from collapsing is a sum of terms on the embeddings of the batch: VICReg (Bardes et al. 2021, arXiv:2105.04906),
Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230), LeJEPA (Balestriero and LeCun 2025, arXiv:2511.08544), M-FLAG (Liu et al.
2023, arXiv:2307.08347) are settings of `terms`. With one view, no pair and no projector it is a regulariser beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from headwater.model import Model
from headwater.objectives import regularisers
from headwater.objectives.heads import Projector, moments
from headwater.objectives.objective import Batch, Objective, Term, part, wide
from headwater.tokens import in_all, of
from headwater.view import View

Name = Literal[
    "invariance", "alignment", "barlow", "variance", "covariance", "orthogonality", "spread", "gaussian", "unit"
]  # the first three compare two views, the others take one
VIEW = View(share=(0.3, 1.0), strength=1.0)
PAIRED = ("invariance", "alignment", "barlow")


class JointEmbedding(Objective):
    """Asks that what belongs together be embedded alike; each term is the mean over pairs of views, or over views.

    - invariance: squared difference. alignment: 2 - 2 cos. barlow: cross-correlation of a pair to the identity.
    - variance: hinge on the deviation. covariance: of unlike features. orthogonality: correlation to the identity.
    - spread: distance to the nearest neighbour. gaussian: random projections to the normal distribution. unit: KL divergence of
      the batch's mean and variance from the normal distribution.

    The weights of the official VICReg are invariance 25, variance 25, covariance 2, because it sums the last over both views.

    Args:
        model: gives pooled vectors, in the shared space if there is one.
        modalities: one, of which there are several views, or several.
        terms: name -> weight.
        views: random views per modality; 0 = the signal as the source gives it.
        view: what they look like.
        projector: sizes behind the pooled vector, one head per modality; none = the pooled vectors themselves.
        norm: inside of the projectors. last_norm: behind their last layer too.
        off_diagonal: weight of barlow's redundancy.
        slices: random directions of the term gaussian.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        modalities: Sequence[str] = ("image",),
        terms: dict[Name, float] | None = None,
        views: int = 2,
        view: View = VIEW,
        projector: Sequence[int] = (512, 512, 128),
        norm: Literal["batch", "layer", "none"] = "batch",
        last_norm: bool = False,
        off_diagonal: float = 0.0051,
        slices: int = 256,
    ) -> None:
        super().__init__()
        self.terms = {"invariance": 25.0, "variance": 25.0, "covariance": 2.0} if terms is None else dict(terms)
        self.modalities, self.off_diagonal, self.slices = tuple(modalities), off_diagonal, slices
        self.keys = {m: tuple(f"{m}@{i}" for i in range(views)) if views else (m,) for m in modalities}
        self.needs = tuple(key for keys in self.keys.values() for key in keys)
        self.views = dict.fromkeys(self.needs, view) if views else {}
        self._check()
        widths = {m: model.dim(m) for m in modalities}
        sizes = {m: (widths[m], *projector) for m in modalities}
        self.heads = nn.ModuleDict({m: Projector(sizes[m], norm, last_norm) if projector else nn.Identity() for m in modalities})
        self.width = projector[-1] if projector else widths[self.modalities[0]]
        if any(size[-1] != self.width for size in sizes.values()):
            raise ValueError(f"found vectors of {widths} numbers and no projector; give one, for example [512, 128]")

    def _check(self) -> None:
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"found modalities {list(self.modalities)}; expected at least one, none twice")
        if not self.terms or set(self.terms) - set(get_args(Name)):
            raise ValueError(f"found terms {sorted(self.terms)}; expected some of {', '.join(get_args(Name))}")
        if len(self.needs) < 2 and (pairs := set(self.terms) & set(PAIRED)):
            raise ValueError(f"{', '.join(sorted(pairs))} compare two views, but there is only {self.needs[0]}; set views: 2")

    def task(self, batch: Batch, hints: None = None) -> Batch:
        if "gaussian" not in self.terms:
            return batch
        return {**batch, "directions": regularisers.directions(batch["seed"], self.width, self.slices)}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        sample = in_all([batch[key].samples() for key in self.needs])
        return dict.fromkeys(self.terms, torch.tensor(len(sample), device=sample.device))

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        pooled = model.represent(part(batch, self.needs))
        sample = in_all([p.sample for p in pooled.values()])
        x = {m: torch.stack([of(pooled[key], sample) for key in keys]) for m, keys in self.keys.items()}
        z = wide(torch.cat([self.heads[m](v) for m, v in x.items()]))
        terms = self._functions(batch)
        values = {name: torch.stack([f(*given) for given in self._given(name, z)]).mean() for name, f in terms.items()}
        number = torch.tensor(len(sample), device=z.device)
        return {name: Term(value * number, number, self.terms[name]) for name, value in values.items()}  # type: ignore[index]

    def _given(self, name: str, z: Tensor) -> list[tuple[Tensor, ...]]:
        """z: (V, S, D) -> the pairs of views, or the views, that a term takes."""
        return list(combinations(z, 2)) if name in PAIRED else [(x,) for x in z]

    def _functions(self, batch: Batch) -> dict[str, Callable[..., Tensor]]:
        r = regularisers
        every: dict[str, Callable[..., Tensor]] = {
            "invariance": r.invariance,
            "alignment": r.alignment,
            "barlow": lambda a, b: r.identity_error(r.cross_correlation(a, b), self.off_diagonal),
            "variance": r.variance,
            "covariance": r.covariance,
            "orthogonality": lambda x: r.identity_error(r.cross_correlation(x, x)),
            "spread": r.spread,
            "gaussian": lambda x: r.gaussianity(x, batch["directions"]),
            "unit": lambda x: r.unit_gaussian(*moments(x)),
        }
        return {name: every[name] for name in self.terms}
