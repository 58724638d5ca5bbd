"""Joint-token fusion: all modalities in one sequence under one trunk (as in VisualBERT, arXiv:1908.03557)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from headwater.model import Fusion
from headwater.tokens import Tokens, cat, split
from headwater.trunk import Trunk

AXES = 3  # time, row, column: with fewer, the code of a token would depend on which modalities are beside it


class JointTokens(Fusion):
    """Adds a learned vector per modality, joins the tokens along N, mixes them, and hands each modality its own back.

    Args:
        widths: modality -> D of its encoder.
        trunk: the transformer that mixes; modalities of another width enter and leave through linear layers.
            None = two blocks of the widest encoder's width.
    """

    def __init__(self, widths: dict[str, int], trunk: Trunk | None = None) -> None:
        super().__init__(widths)
        trunk = trunk or Trunk(max(widths.values()), depth=2)
        other = {name: width for name, width in widths.items() if width != trunk.width}
        self.enter = nn.ModuleDict({name: nn.Linear(width, trunk.width) for name, width in other.items()})
        self.leave = nn.ModuleDict({name: nn.Linear(trunk.width, width) for name, width in other.items()})
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.randn(trunk.width) * 0.02) for name in widths})
        self.trunk = trunk

    def forward(self, parts: dict[str, Tokens], causal: bool = False) -> dict[str, Tokens]:
        names = {name: name.partition("@")[0] for name in parts}
        entered = [
            t._replace(x=(self.enter[names[n]](t.x) if names[n] in self.enter else t.x) + self.kind[names[n]])
            for n, t in parts.items()
        ]
        joined = cat(entered)
        joined = joined._replace(position=F.pad(joined.position, (0, max(0, AXES - joined.position.shape[-1]))))
        mixed = split(self.trunk(joined, causal), [t.x.shape[1] for t in entered])
        return {
            n: t._replace(x=self.leave[names[n]](m.x) if names[n] in self.leave else m.x)
            for (n, t), m in zip(parts.items(), mixed, strict=True)
        }
