"""Sparse plus low-rank weights: W = alpha / rank * B A + S, where S has a few entries at places that stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwater import random
from headwater.forms.form import BLOCKS, Form, Formed
from headwater.init import BRANCH, PATH, Rule


def support(count: int, shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """`count` places of a matrix, all sets of that size equally likely, as sorted flat numbers: (count,) int64."""
    generator = torch.Generator("cpu").manual_seed(int(random.fold(torch.tensor(seed, device="cpu"), name)))
    return torch.randperm(shape[0] * shape[1], generator=generator, device="cpu")[:count].sort().values


def composed(low: Tensor | None, values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix, or zeros, with values added at flat places: (out, in) or None, (K,), (K,) -> (out, in)."""
    flat = values.new_zeros(shape).flatten() if low is None else low.flatten()
    return flat.index_add(0, index, values.to(flat.dtype)).view(shape)


class Sparse(Formed):
    """weight = scale * b @ a + S: a (rank, in), b (out, rank), `values` (K,) at the flat places `index` (K,); rank 0 = S alone."""

    index: Tensor

    def __init__(self, linear: nn.Linear, rank: int, scale: float, count: int, seed: int, name: str) -> None:
        super().__init__(linear)
        old = linear.weight.detach()
        self.scale, self.where = scale, (count, (self.out_features, self.in_features), seed, name)
        self.a = nn.Parameter(old.new_empty(rank, self.in_features), linear.weight.requires_grad) if rank else None
        self.b = nn.Parameter(old.new_empty(self.out_features, rank), linear.weight.requires_grad) if rank else None
        self.values = nn.Parameter(old.new_empty(count), linear.weight.requires_grad)
        self.register_buffer("index", torch.empty(count, device=old.device, dtype=torch.int64))

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        """S starts as these entries of the weight would, B as zero (section 3.3 of the paper)."""
        low = {} if self.a is None else {"a": PATH, "b": rule._replace(value=0.0)}
        place = Rule("fixed", lambda: support(*self.where))
        return {**low, "values": rule._replace(fan_in=self.in_features), "index": place}

    def new_rules(self) -> dict[str, Rule]:
        return self.weight_rules(BRANCH)

    @property
    def weight(self) -> Tensor:
        low = None if self.a is None or self.b is None else self.scale * self.b @ self.a
        return composed(low, self.values, self.index, (self.out_features, self.in_features))


class SparseLowRank(Form):
    """Sparse plus low-rank: W = alpha / rank * B A + S (SLTrain, Han et al. 2024, arXiv:2406.02214).

    https://github.com/andyjm3/SLTrain. The support of S is drawn uniformly and stays; its values train. Per layer rank * (in + out)
    + K parameters, with K = density * in * out, and 8 K bytes for the places; the dense weight exists only while it is used, in
    either pass. `rank: 0` is a sparse weight with the memory of its entries. Merges.

    Args:
        match, seed: as in Form; the support is a function of the seed and the layer's name.
        rank: of B A; 0 = none.
        density: share of entries that S has.
        alpha: size of B A; None = rank, a factor of 1.
    """

    layer = Sparse

    def __init__(
        self, match: str = BLOCKS, rank: int = 16, density: float = 0.03, alpha: float | None = None, seed: int = 0
    ) -> None:
        super().__init__(match, seed)
        if rank < 0 or not 0 < density <= 1:
            raise ValueError(f"found rank {rank} and density {density}; expected 0 or more, and a share above 0 and up to 1")
        self.rank, self.density, self.scale = rank, density, (alpha or rank) / max(1, rank)

    def make(self, linear: nn.Linear, name: str) -> nn.Module:
        count = max(1, round(self.density * linear.in_features * linear.out_features))
        return Sparse(linear, self.rank, self.scale, count, self.seed, name)
