"""Clusters as targets: each side is asked for the prototype that the other side was assigned to.

SwAV between two views (Caron et al. 2020, arXiv:2006.09882; https://github.com/facebookresearch/swav); between modalities the
prototype-level contrast of ProtoCLIP (Chen et al. 2022, arXiv:2206.10996), with assignments of the batch in place of k-means.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import TABLE, Rule
from headwater.model import Model
from headwater.objectives.comparison import sinkhorn
from headwater.objectives.objective import Batch, Objective, Term, part, viewed, wide
from headwater.view import View


def swapped(a: Tensor, b: Tensor, temperature: float, entropy: float) -> Tensor:
    """Sum over pairs of the mean of both cross entropies, each against the other side's assignment.

    a, b: cosines with K prototypes, (S, K) of this rank's pairs; assignments give all prototypes equal shares of all ranks' pairs.
    entropy: of Sinkhorn's assignments, as a temperature of the cosines.
    """
    ours, theirs = ((x / temperature).log_softmax(1) for x in (a, b))
    return -((sinkhorn(b.detach(), entropy) * ours).sum() + (sinkhorn(a.detach(), entropy) * theirs).sum()) / 2


class Swapped(Objective):
    """Hides the other side: what cluster is it in?

    Args:
        model: gives pooled vectors.
        a, b: two modalities, or two views of one ("image@0", "image@1").
        prototypes: K, a few times the number of expected clusters; at most about the batch of all ranks, or shares are rounded off.
        shared: both sides have the same directions, in one space; else each modality has its own, of which numbers correspond, so
            that the two need not lie close together.
        temperature: of the answers. entropy: of the assignments; lower = harder.
        views: how random views among a and b are made; one that is not named here is the reader's own.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        a: str = "image",
        b: str = "text",
        prototypes: int = 64,
        shared: bool = False,
        temperature: float = 0.1,
        entropy: float = 0.05,
        views: dict[str, View] | None = None,
    ) -> None:
        super().__init__()
        if a == b:
            raise ValueError(f"found {a} paired with itself; expected two sides, such as {a}@0 and {a}@1")
        if prototypes < 2 or min(temperature, entropy) <= 0:
            raise ValueError(
                f"found {prototypes} prototypes, temperature {temperature} and entropy {entropy}; expected 2 or more, and above 0"
            )
        dims = {name.partition("@")[0]: model.dim(name) for name in (a, b)}
        if shared and len(set(dims.values())) > 1:
            raise ValueError(f"pooled vectors have different sizes, {dims}; give the model a shared space, or set shared: false")
        self.needs, self.shared, self.temperature, self.entropy = (a, b), shared, temperature, entropy
        self.views = viewed((a, b), views)
        dims = {"all": model.dim(a)} if shared else dims
        self.prototypes = nn.ParameterDict({name: nn.Parameter(torch.randn(prototypes, dim)) for name, dim in dims.items()})

    def init_rules(self) -> dict[str, Rule]:
        return {f"prototypes.{name}": TABLE for name in self.prototypes}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        a, b = (batch[name].samples() for name in self.needs)
        return {"swapped": torch.isin(a, b).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        pooled = model.represent(part(batch, self.needs))
        cosines: list[Tensor] = []
        for name, other in (self.needs, self.needs[::-1]):
            x = wide(pooled[name].x[torch.isin(pooled[name].sample, pooled[other].sample)])
            direction = self.prototypes["all" if self.shared else name.partition("@")[0]]
            cosines.append(F.normalize(x, dim=-1) @ F.normalize(direction.to(x.dtype), dim=-1).T)
        total = swapped(cosines[0], cosines[1], self.temperature, self.entropy)
        return {"swapped": Term(total, torch.tensor(len(cosines[0]), device=total.device))}
