"""Terms that keep embeddings from collapsing, as numbers of the whole batch: equal on all ranks, with exact gradients.

Every function takes the rows (S, D) of this rank, sees those of all ranks, and returns one number (). An objective adds it as
Term(number * S, S), so that ranks of uneven shares weigh it right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import distributed, random
from headwater.objectives.heads import moments, rows


def invariance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of (S, D) and (S, D), the first term of VICReg."""
    return distributed.summed((a - b).square().mean(-1).sum()) / rows(a)


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean of 2 - 2 cos: the squared difference of unit vectors."""
    return 2 - 2 * distributed.summed(F.cosine_similarity(a, b, dim=-1).sum()) / rows(a)


def variance(x: Tensor, floor: float = 1.0) -> Tensor:
    """Mean over features of max(0, floor - deviation), the hinge of VICReg (Bardes et al. 2021, arXiv:2105.04906, equation 1).

    https://github.com/facebookresearch/vicreg
    """
    n = rows(x)
    unbiased = moments(x)[1] * n / (n - 1).clamp(min=1)
    return (floor - (unbiased + 1e-4).sqrt()).relu().mean()


def covariance(x: Tensor) -> Tensor:
    """Sum of squared covariances of unlike features, over D (VICReg, equation 4)."""
    away = x - moments(x)[0]
    c = distributed.summed(away.T @ away) / (rows(x) - 1).clamp(min=1)
    return off_diagonal(c).square().sum() / x.shape[1]


def cross_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(S, D) and (S, D) -> (D, D) correlations of the features of a with those of b."""
    (mean_a, var_a), (mean_b, var_b) = moments(a), moments(b)
    c = distributed.summed((a - mean_a).T @ (b - mean_b)) / rows(a)
    return c * (var_a + 1e-5).rsqrt()[:, None] * (var_b + 1e-5).rsqrt()


def identity_error(c: Tensor, off: float = 1.0) -> Tensor:
    """Sum of squares of C - I, those off the diagonal times `off`.

    Of the cross-correlation of two views it is Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230, equation 1;
    https://github.com/facebookresearch/barlowtwins); of the correlation of one, with off = 1, the orthogonality term of
    M-FLAG (Liu et al. 2023, arXiv:2307.08347).
    """
    return (1 - c.diagonal()).square().sum() + off * off_diagonal(c).square().sum()


def off_diagonal(c: Tensor) -> Tensor:
    """The square matrix with zeros on its diagonal."""
    return c - c.diagonal().diag()


def spread(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of -log(distance to the nearest other row), of unit vectors: the Kozachenko-Leonenko estimate of entropy.

    KoLeo (Sablayrolles et al. 2018, arXiv:1806.03198) as in DINOv2 (https://github.com/facebookresearch/dinov2), but with the
    neighbours of all ranks. Rows that are exactly alike push nothing; one row alone has no neighbour and gives 0.
    """
    x = F.normalize(x, dim=-1)
    every, first = distributed.gather(x)
    if len(every) < 2:
        return 0 * distributed.summed(x.sum())
    with torch.no_grad():
        likeness = x @ every.T
        own = torch.arange(len(x), device=x.device)
        likeness[own, own + first] = -2.0  # below every cosine
        nearest = likeness.argmax(1)
    distance = ((x - every[nearest]).square().sum(-1) + eps**2).sqrt()
    return -distributed.summed(distance.log().sum()) / rows(x)


def unit_gaussian(mean: Tensor, var: Tensor) -> Tensor:
    """KL divergence of normal distributions from the standard one, mean over features: (..., D), (..., D) -> (...).

    Of a probabilistic head per sample (VIB, Alemi et al. 2016, arXiv:1612.00410); of `moments(x)` for a whole batch.
    """
    return (mean.square() + var - 1 - var.clamp(min=1e-12).log()).mean(-1) / 2


def directions(seed: Tensor, width: int, number: int) -> Tensor:
    """(D, number) random unit vectors, a function of the sum of the seeds (S,) of all ranks, so equal on all of them."""
    shared = distributed.total(seed.sum())  # wraps around, in any order
    return F.normalize(random.normal(shared, (width, number), "directions"), dim=0)


def gaussianity(x: Tensor, direction: Tensor, knots: int = 17, end: float = 3.0) -> Tensor:
    """How far all projections of x are from standard normal: SIGReg of LeJEPA (Balestriero and LeCun 2025, arXiv:2511.08544).

    The statistic of Epps and Pulley, n * integral of |mean of e^(itx) - e^(-t^2/2)|^2 e^(-t^2/2) dt by trapezoids on `knots`
    points from -end to end, mean over directions (D, M). https://github.com/rbalestr-lab/lejepa
    """
    t = torch.linspace(0, end, knots, device=x.device, dtype=x.dtype)
    weight = torch.full_like(t, 2 * end / (knots - 1))  # both halves of the axis are alike
    weight[[0, -1]] /= 2
    window = (-t.square() / 2).exp()
    phase = (x @ direction.to(x.dtype))[..., None] * t
    n = rows(x)
    real, imaginary = (distributed.summed(part.sum(0)) / n for part in (phase.cos(), phase.sin()))
    error = (real - window).square() + imaginary.square()
    return n * (error @ (weight * window)).mean()
