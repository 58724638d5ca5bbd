"""Low-rank factors in place of a weight: trained from scratch, or the truncated SVD of what was trained before."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.forms.form import BLOCKS, Form, Formed, gathered, shared
from headwater.init import BRANCH, Rule


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of that rank, (out, in) -> (out, rank), (rank, in), with equal norms.

    The error in Frobenius norm is the root of the sum of squares of the singular values that are left out (Eckart and Young 1936).
    """
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    u, v = u[:, :rank] * root, root[:, None] * v[:rank]
    return u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous()  # FSDP2 takes nothing else


def balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with equal norms, and orthogonal inside: (out, rank), (rank, in) -> the same shapes.

    The refactorisation of Glentis et al. 2025, arXiv:2505.22922, by two thin QR decompositions and one SVD of (rank, rank).
    """
    (p, left), (q, right) = torch.linalg.qr(u.double()), torch.linalg.qr(v.double().T)
    inner, s, outer = torch.linalg.svd(left @ right.T)
    root = s.sqrt()
    return (p @ inner * root).to(u.dtype).contiguous(), (root[:, None] * (outer @ q.T)).to(v.dtype).contiguous()


class Factors(Formed):
    """weight = u @ v, with u (out, rank) and v (rank, in)."""

    def __init__(self, linear: nn.Linear, rank: int, svd: bool) -> None:
        super().__init__(linear)
        old = linear.weight.detach()
        self.settled = svd  # its start is that of the weight which was there
        shapes = (self.out_features, rank), (rank, self.in_features)
        u, v = truncated(old, rank) if svd and not old.is_meta else (old.new_empty(shape) for shape in shapes)
        self.u, self.v = (nn.Parameter(x, linear.weight.requires_grad) for x in (u, v))

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        """The product starts with the deviation that the weight would have."""
        rank = self.v.shape[0]
        return {} if self.settled else {"u": rule._replace(fan_in=self.in_features), "v": Rule("path", fan_in=rank)}

    def new_rules(self) -> dict[str, Rule]:
        return self.weight_rules(BRANCH)

    @property
    def weight(self) -> Tensor:
        return self.u @ self.v

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v), self.u, self.bias)

    @torch.no_grad()
    def restart(self, seed: int, name: str) -> list[nn.Parameter]:
        """Balance the factors; returns what has other values now. See `headwater.training.Restarts`."""
        for p, new in zip((self.u, self.v), balanced(gathered(self.u), gathered(self.v)), strict=True):
            p.copy_(shared(new, p))
        return [self.u, self.v]


class LowRank(Form):
    """Weights of low rank: W = U V, trained as they are (Khodak et al. 2021, arXiv:2105.01029; PELA, arXiv:2310.10700).

    rank * (in + out) parameters per layer, and as many operations per token; merges.

    Args:
        match, seed: as in Form.
        rank: of the product, or as a share of the smaller one of in and out.
        start: "drawn" by the run's own rules, so that the product starts as the weight would; "svd" = the truncated SVD of the
            weight that is there, such as one that was trained before.
    """

    layer = Factors

    def __init__(
        self, match: str = BLOCKS, rank: int | float = 0.25, start: Literal["drawn", "svd"] = "drawn", seed: int = 0
    ) -> None:
        super().__init__(match, seed)
        if rank <= 0 or (isinstance(rank, float) and rank > 1):
            raise ValueError(f"found rank {rank}; expected a whole number from 1 on, or a share of the smaller side, up to 1.0")
        self.rank, self.start = rank, start

    def make(self, linear: nn.Linear, name: str) -> nn.Module:
        side = min(linear.in_features, linear.out_features)
        rank = max(1, round(self.rank * side)) if isinstance(self.rank, float) else min(self.rank, side)
        return Factors(linear, rank, self.start == "svd")
