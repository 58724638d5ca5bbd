"""Codes that are the cells of a grid, of which nothing is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headwater.init import Rule
from headwater.modalities.bottlenecks.bottleneck import Bottleneck, Coded


class FSQ(Bottleneck):
    """A few numbers, each rounded to a few levels: a grid in place of a codebook, so that nothing can fall out of use.

    Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505). z is bounded by tanh to the range of its levels and rounded,
    with the gradient of what was not; the id is the number of the cell, the first number changing fastest. There is no loss.

    Args:
        levels: of each number; [8, 5, 5, 5] makes 1000 codes.
    """

    basis: Tensor
    steps: Tensor

    def __init__(self, levels: tuple[int, ...] = (8, 5, 5, 5)) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"found levels {list(levels)}; expected 2 or more for each number, for example [8, 5, 5, 5]")
        self.levels = tuple(levels)
        self.inputs = self.features = len(levels)
        self.vocab = math.prod(levels)
        self.register_buffer("steps", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([math.prod(levels[:k]) for k in range(len(levels))]), persistent=False)

    def init_rules(self) -> dict[str, Rule]:
        fixed = {"steps": list(self.levels), "basis": [math.prod(self.levels[:k]) for k in range(len(self.levels))]}
        return {name: Rule("fixed", lambda values=values: torch.tensor(values)) for name, values in fixed.items()}  # type: ignore[misc]

    def forward(self, z: Tensor, seed: Tensor | None = None, progress: float = 1.0) -> Coded:
        z = bounded(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z, self.steps)
        x = z + (z.round() - z).detach()
        cell = x.detach().long() + self.steps // 2
        return Coded(x / (self.steps // 2), (cell * self.basis).sum(-1, keepdim=True))

    def vectors(self, codes: Tensor) -> Tensor:
        cell = codes // self.basis % self.steps - self.steps // 2
        return cell.float() / (self.steps // 2)


def bounded(z: Tensor, levels: Tensor) -> Tensor:
    """(..., d) any numbers -> (..., d) numbers that round to one of `levels` (d,) integers around zero, -levels // 2 first.

    Of an even number of levels one more lies below zero than above; zero itself stays zero.
    """
    levels = levels.to(z.dtype)
    half, offset = (levels - 1) / 2 * (1 + 1e-3), (levels + 1) % 2 / 2
    return torch.tanh(z + torch.atanh(offset / half)) * half - offset
