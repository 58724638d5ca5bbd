"""Joint-token fusion: all modalities in one sequence under one trunk (as in VisualBERT, arXiv:1908.03557)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import TABLE, Rule
from headwater.model import Fusion
from headwater.position import sincos
from headwater.tokens import Tokens, cat, split
from headwater.trunk import Trunk

AXES = 5  # as many as any signal here has: with fewer, the code of a token would depend on which modalities are beside it


def base(name: str) -> str:
    """The modality of a view: "image" of "image@global0"."""
    return name.partition("@")[0]


def join(parts: dict[str, Tokens]) -> Tokens:
    """All tokens of all modalities along N, each with as many coordinates."""
    joined = cat(list(parts.values()))
    return joined._replace(position=_axes(joined.position))


def located(t: Tokens) -> Tokens:
    """With sines of the coordinates added, for layers that add none themselves; appended tokens have no place."""
    code = sincos(_axes(t.position), t.x.shape[-1]).to(t.x.dtype)
    return t._replace(x=t.x + code * t.given()[..., None])


def _axes(position: Tensor) -> Tensor:
    return F.pad(position, (0, max(0, AXES - position.shape[-1])))


def check_names(asked: Sequence[str], widths: dict[str, int], what: str) -> None:
    """Modalities that a fusion is told to use must be there."""
    if stray := [name for name in asked if name not in widths]:
        raise ValueError(f"{what} names {', '.join(stray)}; the modalities that reach this fusion are {', '.join(widths)}")


class Entry(nn.Module):
    """Modalities of any widths brought to one: a linear layer where it differs, and a learned vector per modality."""

    def __init__(self, widths: dict[str, int], width: int) -> None:
        super().__init__()
        self.enter = nn.ModuleDict({name: nn.Linear(w, width) for name, w in widths.items() if w != width})
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.02) for name in widths})

    def init_rules(self) -> dict[str, Rule]:
        return {f"kind.{name}": TABLE for name in self.kind}

    def forward(self, parts: dict[str, Tokens]) -> dict[str, Tokens]:
        """(B, N, D of the modality) -> (B, N, width), for every part."""
        out = {}
        for name, t in parts.items():
            x = self.enter[base(name)](t.x) if base(name) in self.enter else t.x
            out[name] = t._replace(x=x + self.kind[base(name)].to(x.dtype))
        return out


class Leave(nn.Module):
    """The way back: a linear layer where a modality's width differs."""

    def __init__(self, widths: dict[str, int], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(width, w) for name, w in widths.items() if w != width})

    def forward(self, name: str, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, D of the modality)."""
        return self.layers[base(name)](x) if base(name) in self.layers else x


class JointTokens(Fusion):
    """Adds a learned vector per modality, joins the tokens along N, mixes them, and hands each modality its own back.

    Args:
        widths: modality -> D of its encoder.
        trunk: the transformer that mixes; modalities of another width enter and leave through linear layers.
            None = two blocks of the widest encoder's width.
        levels: modality -> number; tokens see those of their own level and below, so that {text: 1} lets words see pictures
            while the vectors of pictures never depend on words, and can be computed once. Names left out have level 0.
            None = all see all. Causal passes are refused, because there `order` alone says what may see what.
    """

    cacheable = True

    def __init__(self, widths: dict[str, int], trunk: Trunk | None = None, levels: dict[str, int] | None = None) -> None:
        super().__init__(widths)
        trunk = trunk or Trunk(max(widths.values()), depth=2)
        check_names([*(levels or {})], widths, "levels")
        self.entry, self.leave = Entry(widths, trunk.width), Leave(widths, trunk.width)
        self.trunk, self.levels, self.keeps_order = trunk, levels, levels is None

    def forward(self, parts: dict[str, Tokens], causal: bool = False) -> dict[str, Tokens]:
        lengths = {name: t.x.shape[1] for name, t in parts.items()}
        entered = self.entry(parts)
        if self.levels is not None:
            if causal:
                raise ValueError("found levels in a causal pass, where `order` says what may see what; leave levels out")
            level = {name: self.levels.get(base(name), 0) for name in parts}
            entered = {name: t._replace(order=torch.full_like(t.sample(), level[name])) for name, t in entered.items()}
        mixed = self.mix(join(entered), causal or self.levels is not None, lengths)
        pieces = split(mixed, [*lengths.values()])
        return {n: t._replace(x=self.leave(n, piece.x)) for (n, t), piece in zip(parts.items(), pieces, strict=True)}

    def mix(self, joined: Tokens, causal: bool, lengths: dict[str, int]) -> Tokens:
        """Joined tokens (B, sum of lengths, D) -> the same, mixed. lengths: columns of each part, in their order."""
        return self.trunk(joined, causal)
