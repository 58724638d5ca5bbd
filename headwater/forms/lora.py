"""Low-rank additions to weights that stay: LoRA, with the directions and lengths of DoRA where wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.forms.form import BLOCKS, Around, Form, Formed, gathered, shared, start
from headwater.init import BRANCH, PATH, ZERO, Rule


def rescaled(weight: Tensor, moved: Tensor, growth: Tensor) -> Tensor:
    """Rows of `moved` at the length of those of `weight` plus `growth`: (out, in), (out, in), (out,) -> (out, in).

    DoRA (Liu et al. 2024, arXiv:2402.09353): a weight's lengths and directions are learned apart. Lengths of what moves are
    taken without gradient, as in section 4.3 of the paper, which saves memory; `growth` is the paper's magnitude less its start.
    """
    return ((weight.norm(dim=1) + growth) / moved.detach().norm(dim=1))[:, None] * moved


class Added(Around):
    """weight + scale * b @ a: a is (rank, in), b (out, rank) and zero at first; growth is (out,), of DoRA alone, or None."""

    added: tuple[str, ...] = ("a", "b")

    def __init__(self, base: nn.Linear | Formed, rank: int, scale: float, lengths: bool) -> None:
        super().__init__(base)
        if lengths and isinstance(base, Formed):
            raise ValueError(f"found lengths on {type(base).__name__}; expected a plain linear layer, whose rows have lengths")
        self.scale, like = scale, base.weight.detach()
        self.a = nn.Parameter(like.new_empty(rank, self.in_features))
        self.b = nn.Parameter(like.new_empty(self.out_features, rank))
        self.growth = nn.Parameter(like.new_empty(self.out_features)) if lengths else None
        if lengths:
            self.added = ("a", "b", "growth")

    def new_rules(self) -> dict[str, Rule]:
        return {"a": PATH, "b": BRANCH._replace(value=0.0)} | ({} if self.growth is None else {"growth": ZERO})

    def changed(self, weight: Tensor) -> Tensor:
        moved = weight + self.scale * self.b @ self.a
        return moved if self.growth is None else rescaled(weight, moved, self.growth)

    def forward(self, x: Tensor) -> Tensor:
        if self.growth is not None:
            return super().forward(x)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def restart(self, seed: int, name: str) -> list[nn.Parameter]:
        """Merge the addition into the weight inside and begin another one: ReLoRA (Lialin et al. 2023, arXiv:2307.05695).

        Returns what has other values now; see `headwater.training.Restarts`.
        """
        if not isinstance(self.base, nn.Linear) or self.growth is not None:
            found = f"LoRA around {type(self.base).__name__}" if self.growth is None else "LoRA with lengths"
            raise ValueError(f"found {found} at {name}; restarts merge plain additions into plain linear layers")
        weight = self.base.weight
        weight.add_(shared(self.scale * gathered(self.b) @ gathered(self.a), weight))
        fresh = Added(nn.Linear(self.in_features, self.out_features, device="meta"), len(self.a), self.scale, False)
        fresh = fresh.to_empty(device=weight.device).to(weight.dtype)
        start(fresh, name, seed)
        self.a.copy_(shared(fresh.a, self.a))
        self.b.zero_()
        return [self.a, self.b]


class LoRA(Form):
    """Low-rank adaptation: y = W x + alpha / rank * B A x, and only A and B train (Hu et al. 2021, arXiv:2106.09685).

    https://github.com/microsoft/LoRA. rank * (in + out) parameters per layer, and out more with `lengths`; no effect at first;
    merges. `headwater.training.Restarts` makes ReLoRA of it.

    Args:
        match, seed: as in Form.
        rank: of the addition.
        alpha: its size; None = rank, a factor of 1.
        lengths: the rows of the weight have learned lengths, and A and B turn them: DoRA (arXiv:2402.09353).
        frozen: nothing else trains in the encoders or fusion around these layers.
    """

    kinds, layer = (nn.Linear, Formed), Added

    def __init__(
        self,
        match: str = BLOCKS,
        rank: int = 8,
        alpha: float | None = None,
        lengths: bool = False,
        frozen: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(match, seed)
        if rank < 1:
            raise ValueError(f"found rank {rank}; expected 1 or more")
        self.rank, self.scale, self.lengths, self.frozen = rank, (alpha or rank) / rank, lengths, frozen

    def make(self, old: nn.Linear | Formed, name: str) -> nn.Module:
        return Added(old, self.rank, self.scale, self.lengths)
