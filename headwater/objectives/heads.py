"""Heads that objectives put on embeddings and that are thrown away after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from headwater import distributed
from headwater.init import ONE, ZERO, Rule
from headwater.objectives.objective import wide


class GlobalNorm(nn.Module):
    """Batch normalisation by the statistics of the rows of all ranks (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Gradients flow through the statistics, so N ranks equal one process, uneven shares and CPU included. It keeps no running
    statistics: heads are not used after pretraining, and teachers too normalise by what they see.

    Args:
        width: D. affine: learn a scale and a shift per feature. eps: added to the variance.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def init_rules(self) -> dict[str, Rule]:
        return {} if self.weight is None else {"weight": ONE, "bias": ZERO}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), normalised over all rows of all ranks."""
        flat = wide(x).flatten(0, -2)
        mean, variance = moments(flat)
        normal = (flat - mean) * (variance + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            normal = normal * self.weight + self.bias
        return normal.to(x.dtype).view(x.shape)


def rows(x: Tensor) -> Tensor:
    """(S, ...) -> () how many rows all ranks have together, at least 1, as a number of the type of x."""
    return distributed.total(torch.tensor(float(len(x)), device=x.device, dtype=x.dtype)).clamp(min=1)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and variance (D,), divided by the number of rows, over the rows (S, D) of all ranks, with gradient."""
    number = rows(x)
    mean = distributed.summed(x.sum(0)) / number
    return mean, distributed.summed((x - mean).square().sum(0)) / number


class Projector(nn.Sequential):
    """Linear layers with a norm and GELU between them.

    Args:
        sizes: of the input, of what lies between, and of the output.
        norm: behind each linear layer but the last: over the batch, over the features, or none.
        last_norm: one without learned scale behind the last layer too, as SimSiam and Barlow Twins have it in places.
    """

    def __init__(self, sizes: Sequence[int], norm: Literal["batch", "layer", "none"] = "batch", last_norm: bool = False) -> None:
        if len(sizes) < 2:
            raise ValueError(f"found sizes {list(sizes)} of a projector; expected at least those of its input and output")
        layers: list[nn.Module] = []
        for number, (before, behind) in enumerate(pairwise(sizes)):
            last = number == len(sizes) - 2
            layers.append(nn.Linear(before, behind, bias=norm == "none" or (last and not last_norm)))
            if norm != "none" and (last_norm or not last):
                layers.append(GlobalNorm(behind, affine=not last) if norm == "batch" else nn.LayerNorm(behind))
            if not last:
                layers.append(nn.GELU())
        super().__init__(*layers)
