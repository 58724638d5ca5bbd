"""Scores between distributions: a sample is a Gaussian, and a vague caption a wide one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import Rule, constant
from headwater.model import Model
from headwater.objectives.contrast.scores import Items, Score
from headwater.objectives.objective import wide
from headwater.tokens import Pooled


def inclusion(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """log of the integral of p_a^2 p_b minus that of p_a p_b^2: above 0 where `a` lies inside of `b`.

    Closed form per dimension for Gaussians with diagonal covariance (Chun et al. 2024, ProLIP, arXiv:2410.18857, equation 6).
    a, b: mean and log variance, (S, D) each -> (S,).
    """
    (m, log_v), (n, log_w) = a, b
    v, w = log_v.exp(), log_w.exp()
    apart = (m - n).square()
    inside = -(log_v + (v + 2 * w).log()) / 2 - apart / (v + 2 * w)
    outside = -(log_w + (w + 2 * v).log()) / 2 - apart / (w + 2 * v)
    return (inside - outside).sum(-1)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(mean, variance) to N(0, 1) summed over dimensions, in nats: (S, D), (S, D) -> (S,)."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2


class Gaussian(Score):
    """Minus the closed-form sampled distance of two Gaussians: -(||mu_a - mu_b||^2 + ||s_a^2 + s_b^2||_1).

    PCME++ (Chun 2023, arXiv:2305.18171, equation 1; https://github.com/naver-ai/pcmepp), whose loss is Sigmoid. Means are the
    unit vectors of the shared space, log variances come from a linear layer per modality on the pooled vector.

    Args:
        model: gives pooled vectors of equal size (`space`).
        names: modalities, or views of them.
        log_variance: of every dimension at the start.
        kl: weight of the divergence from N(0, 1), which keeps variances from vanishing (1e-4 in PCME++; per pair, both sides).
        wide: the modality whose Gaussians shall include their partners', such as the text (ProLIP). None = no such term.
        include: weight of that term, - log sigmoid(slope * inclusion); slope: as there.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        log_variance: float = -6.0,
        kl: float = 1e-4,
        wide: str | None = None,
        include: float = 0.01,
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        dims = {name.partition("@")[0]: model.dim(name) for name in names}
        if len(set(dims.values())) > 1:
            raise ValueError(f"pooled vectors have different sizes, {dims}; give the model a shared space, such as `space: 128`")
        if wide is not None and wide not in names:
            raise ValueError(f"found wide: {wide}, but {' and '.join(names)} are compared; name one of them")
        self.start, self.kl, self.wide, self.include, self.slope = log_variance, kl, wide, include, slope
        self.spread = nn.ModuleDict({name: nn.Linear(dim, dim) for name, dim in dims.items()})
        for layer in self.spread.values():
            nn.init.constant_(layer.bias, log_variance)  # type: ignore[arg-type]
        self.extra = ("kl",) if wide is None else ("kl", "inclusion")
        dim = model.dim(names[0])
        self.like = (torch.empty(0, dim), torch.empty(0, dim), torch.empty(0))

    def init_rules(self) -> dict[str, Rule]:
        return {f"spread.{name}.bias": constant(self.start) for name in self.spread}

    def items(self, name: str, vectors: Pooled) -> Items:
        """-> (means (S, D), unit vectors; log variances (S, D); (S,) 1 = of the modality that includes)."""
        x = wide(vectors.x)
        log_variance = self.spread[name.partition("@")[0]](vectors.x).to(x.dtype).clamp(-20, 10)
        return F.normalize(x, dim=-1), log_variance, x.new_full((len(x),), float(name == self.wide))

    def forward(self, a: Items, b: Items) -> Tensor:
        apart = a[0].square().sum(-1)[:, None] + b[0].square().sum(-1) - 2 * a[0] @ b[0].T
        return -(apart + a[1].exp().sum(-1)[:, None] + b[1].exp().sum(-1))

    def terms(self, a: Items, b: Items, every_a: Items, every_b: Items) -> dict[str, tuple[Tensor, float]]:
        """ "kl" of both sides, and "inclusion" of the pairs that are to be inside of one another."""
        found = {"kl": (divergence(a[0], a[1]).sum() + divergence(b[0], b[1]).sum(), self.kl)}
        if self.wide is not None:
            log_ratio = (b[2] - a[2]) * inclusion((a[0], a[1]), (b[0], b[1]))  # antisymmetric; 0 for pairs of other modalities
            found["inclusion"] = -F.logsigmoid(self.slope * log_ratio).sum(), self.include
        return found
