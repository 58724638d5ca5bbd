"""Learned queries that ask tokens of any number and answer with a fixed one.

The Perceiver resampler of Flamingo (Alayrac et al. 2022, arXiv:2204.14198) and the Q-Former of BLIP-2 (Li et al. 2023,
arXiv:2301.12597), without the text that the latter's first stage reads along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwater.attention import plan
from headwater.fusion.cross import CrossBlock
from headwater.fusion.joint import Entry, base, check_names, join, located
from headwater.init import TABLE, Rule
from headwater.model import Fusion
from headwater.tokens import Tokens, append, attention_mask


def ask(host: Tokens, queries: Tensor, blocks: nn.ModuleList) -> Tokens:
    """Queries (K, D) for every document of the host (B, N, D), which see its tokens and each other -> (B, K per document, D).

    They are appended tokens: order LAST, position zero, in the row of their document.
    """
    given = host.x.shape[1]
    whole = append(host, queries)
    asked = whole.map(lambda field: field[:, given:])
    route = plan(attention_mask(asked, whole), asked.x, blocks[0].heads)  # type: ignore[arg-type]
    x = asked.x
    for block in blocks:
        x = block(x, torch.cat([host.x, x], 1), route)
    return asked._replace(x=x)


class Resampler(Fusion):
    """Sums up all tokens of some modalities in K per sample, whatever their number.

    The result stands under a key of its own, or in place of a modality; everything else comes out as it went in. Causal: each
    query sees its whole sample, so it has order LAST and nothing sees it, unless `Project` declares it known from the beginning.

    Args:
        widths: modality -> D of its encoder.
        modalities: those that are asked; None = all.
        queries: K.
        depth: number of layers, each cross-attention and a feed-forward layer.
        width: D of the result; None = that of the widest of the modalities.
        heads: attention heads; None = one per 64 of width.
        into: the key of the result. With the name of a modality it takes that one's place.
    """

    cacheable = True

    def __init__(
        self,
        widths: dict[str, int],
        modalities: Sequence[str] | None = None,
        queries: int = 32,
        depth: int = 2,
        width: int | None = None,
        heads: int | None = None,
        into: str = "latent",
    ) -> None:
        super().__init__(widths)
        self.modalities, self.into = tuple(modalities or widths), into
        check_names(self.modalities, widths, "modalities")
        width = width or max(widths[name] for name in self.modalities)
        self.widths[into] = width
        self.entry = Entry({name: widths[name] for name in self.modalities}, width)
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.blocks = nn.ModuleList(CrossBlock(width, heads or max(1, width // 64), width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def init_rules(self) -> dict[str, Rule]:
        return {"queries": TABLE}

    def forward(self, parts: dict[str, Tokens], causal: bool = False) -> dict[str, Tokens]:
        chosen = {name: t for name, t in parts.items() if base(name) in self.modalities}
        if not chosen:
            return dict(parts)
        found = ask(located(join(self.entry(chosen))), self.queries, self.blocks)
        others = {name: t for name, t in parts.items() if base(name) != self.into}
        return others | {self.into: found._replace(x=self.norm(found.x))}
