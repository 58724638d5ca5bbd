"""Mixture of transformers: every modality has its own weights, and all tokens attend to each other.

MoT (Liang et al. 2024, arXiv:2411.04996). With only the feed-forward layers apart it is the mixture of modality experts of
VLMo (Bao et al. 2021, arXiv:2111.02358) and BEiT-3 (Wang et al. 2022, arXiv:2208.10442).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from headwater.attention import Route, attend, plan
from headwater.fusion.joint import JointTokens, base
from headwater.init import BRANCH, Rule
from headwater.layers import Attention, Block, Turn
from headwater.position import rotate
from headwater.tokens import Tokens, attention_mask
from headwater.trunk import Trunk

Columns = dict[str, int]  # part -> how many columns of the joined tokens are its own, in their order


class Separate(nn.ModuleDict):
    """A copy of a layer for every modality, so that a trained trunk can be split; its own columns go through each."""

    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        super().__init__({name: copy.deepcopy(layer) for name in names})

    def forward(self, x: Tensor, columns: Columns) -> Tensor:
        """x: (..., N, D) -> the same shape."""
        parts = x.split([*columns.values()], -2)
        return torch.cat([self.of(base(name), part) for name, part in zip(columns, parts, strict=True)], -2)

    def of(self, name: str, x: Tensor) -> Tensor:
        """What the tokens of one modality become."""
        return self[name](x)


def each(layer: nn.Module, x: Tensor, columns: Columns) -> Tensor:
    """Through a layer that may be separate per modality."""
    return layer(x, columns) if isinstance(layer, Separate) else layer(x)


def take_over(home: nn.Module, other: nn.Module) -> None:
    """All children of the one become children of the other, under their names."""
    nn.Module.__init__(home)
    for name, layer in other.named_children():
        home.add_module(name, layer)


class ColumnAttention(Attention):
    """An attention layer some projections of which are separate. It takes over the layers of `attn`."""

    def __init__(self, attn: Attention) -> None:
        take_over(self, attn)
        self.heads, self.kv_heads, self.size = attn.heads, attn.kv_heads, attn.size

    def init_rules(self) -> dict[str, Rule]:
        return {n: BRANCH for n, _ in self.named_parameters() if n.endswith("weight") and n.startswith(("qkv", "proj"))}

    def forward(self, x: Tensor, route: Route, turn: Turn | None, columns: Columns) -> Tensor:  # type: ignore[override]
        """x: (B, N, D) of the joined tokens -> the same shape."""
        qkv = rearrange(each(self.qkv, x, columns), "b n (h d) -> b h n d", d=self.size)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = each(self.q_norm, q, columns), each(self.k_norm, k, columns)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return each(self.proj, rearrange(attend(q, k, v, route), "b h n d -> b n (h d)"), columns)


class ColumnBlock(Block):
    """A plain block of a trunk some layers of which are separate per modality. It takes over the layers of `block`."""

    def __init__(self, block: Block) -> None:
        if block.parallel or block.post or block.modulation is not None:
            raise ValueError("found a trunk with parallel, post or conditional; separate layers need plain pre-norm blocks")
        take_over(self, block)
        self.parallel, self.post, self.modulation = False, False, None
        self.attn = ColumnAttention(block.attn)

    def forward(self, x: Tensor, route: Route, turn: Turn | None, columns: Columns) -> Tensor:  # type: ignore[override]
        """x: (B, N, D) of the joined tokens -> the same shape."""
        x = x + each(self.ls1, self.attn(each(self.norm1, x, columns), route, turn, columns), columns)
        return x + each(self.ls2, each(self.mlp, each(self.norm2, x, columns), columns), columns)


def walk(trunk: Trunk, t: Tokens, causal: bool, columns: Columns) -> Tokens:
    """What `trunk(t, causal)` does, for blocks that ask whose the columns are."""
    t = trunk.placed(t)
    turn, route = trunk.turn(t), plan(attention_mask(t, t, causal), t.x, trunk.heads, trunk.position.bias(t, t))
    x = each(trunk.norm_pre, t.x, columns)
    for block in trunk.blocks:
        x = block(x, route, turn, columns)
    return t._replace(x=each(trunk.norm, x, columns))


def by_column(trunk: Trunk) -> None:
    """Blocks that know whose columns are whose, for `walk`. Registers belong to no modality, and `walk` skips no branch."""
    if trunk.registers is not None or trunk.drop_path:
        raise ValueError("found a trunk with registers or drop_path; layers that are separate per modality need one without")
    trunk.blocks = nn.ModuleList(ColumnBlock(block) for block in trunk.blocks if isinstance(block, Block))


class MixtureOfTransformers(JointTokens):
    """Joint tokens under a trunk whose norms, projections and feed-forward layers are separate for every modality.

    Args:
        widths: modality -> D of its encoder.
        trunk: what each modality gets a copy of. None = two blocks of the widest encoder's width.
        separate: "all" layers, or only "mlp", the feed-forward layers with their norm, under shared attention.
    """

    cacheable = False

    def __init__(self, widths: dict[str, int], trunk: Trunk | None = None, separate: Literal["all", "mlp"] = "all") -> None:
        super().__init__(widths, trunk)
        by_column(self.trunk)
        names = [*widths]
        for block in self.trunk.blocks:
            homes: list[tuple[Any, tuple[str, ...]]] = [(block, ("norm2", "mlp", "ls2"))]
            if separate == "all":
                homes += [(block, ("norm1", "ls1")), (block.attn, ("qkv", "q_norm", "k_norm", "proj"))]
            for home, layers in homes:
                for layer in layers:
                    setattr(home, layer, Separate(getattr(home, layer), names))
        if separate == "all":
            self.trunk.norm_pre, self.trunk.norm = Separate(self.trunk.norm_pre, names), Separate(self.trunk.norm, names)

    def mix(self, joined: Tokens, causal: bool, lengths: dict[str, int]) -> Tokens:
        return walk(self.trunk, joined, causal, lengths)
