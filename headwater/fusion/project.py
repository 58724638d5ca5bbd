"""Other modalities as a prefix of a language model's input (LLaVA, Liu et al. 2023, arXiv:2304.08485)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwater.cache import current
from headwater.fusion.joint import base, check_names
from headwater.model import Fusion
from headwater.sequence import orders
from headwater.tokens import LAST, Tokens, cat


def running(real: Tensor, document: Tensor) -> Tensor:
    """(B, N) how many real tokens of its document stand before each token in its row; documents may be interleaved."""
    order = document.argsort(dim=1, stable=True)
    real, document = (field.gather(1, order) for field in (real.long(), document))
    before = real.cumsum(1) - real
    first = torch.ones_like(real, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    count = before - torch.where(first, before, 0).cummax(1).values
    return torch.empty_like(count).scatter_(1, order, count)


class Project(Fusion):
    """Projects modalities into the width of another and stands them before its tokens; that one's encoder runs on the result.

    In causal passes the projected tokens have order 0: they see each other in both directions and are seen from the first word
    on, so what is projected must be known from the beginning (a picture to be described, not the frames of the next action).
    The words' orders and positions are shifted by the number of real projected tokens of their sample. Physically the words
    stay the first N and the projected tokens follow them, so that places of targets hold; a sample without any is as it was.

    Within a Cache the first pass brings the projected tokens along; in later ones the words are shifted as far.

    Args:
        widths: modality -> D of its encoder.
        modalities: those that are projected, in the order in which they stand; None = all others. Their own tokens come out as
            they went in.
        last: the modality of the language model, whose encoder runs behind this fusion.
        mlp: two layers with a GELU between (LLaVA-1.5, arXiv:2310.03744) instead of one.
        step: how far a projected token moves the position on, a word being 1. Below 1 many pictures stay within the positions
            that the language model knows (V2PE, Ge et al. 2024, arXiv:2412.09616). Tables of learned positions need 1.
    """

    cacheable = True

    def __init__(
        self,
        widths: dict[str, int],
        modalities: Sequence[str] | None = None,
        last: str = "text",
        mlp: bool = False,
        step: float = 1.0,
    ) -> None:
        super().__init__(widths)
        if not 0 < step <= 1:
            raise ValueError(f"found step {step}; expected above 0 and at most 1, the step of a word")
        self.last, self.step = last, step
        self.modalities = tuple(modalities or (name for name in widths if name != last))
        check_names([last, *self.modalities], widths, "Project")
        if last in self.modalities:
            raise ValueError(f"found {last} among the modalities that are projected; it is the one they are projected to")
        width = widths[last]

        def layer(name: str) -> nn.Module:
            first = nn.Linear(widths[name], width)
            return nn.Sequential(first, nn.GELU(), nn.Linear(width, width)) if mlp else first

        self.enter = nn.ModuleDict({name: layer(name) for name in self.modalities})

    def forward(self, parts: dict[str, Tokens], causal: bool = False) -> dict[str, Tokens]:
        names = [n for m in self.modalities for n in parts if base(n) == m]  # in one order, however the parts came
        cache = current() if causal else None
        if not names:
            if cache is None or self not in cache.before:
                return dict(parts)
            return {n: later(t, cache.before[self], self.step) if base(n) == self.last else t for n, t in parts.items()}
        prefix = cat(
            [t._replace(x=self.enter[base(n)](t.x), order=torch.zeros_like(t.sample())) for n in names for t in [parts[n]]]
        )
        if cache is not None:
            cache.before[self] = prefix.real().sum(1, keepdim=True)
        return {n: stand_before(t, prefix, self.step) if base(n) == self.last else t for n, t in parts.items()}


def later(t: Tokens, count: Tensor, step: float = 1.0) -> Tokens:
    """The same tokens, that many places later in order, and as many steps in position. count: (B, N or 1) whole numbers."""
    order = orders(t)
    position = t.position.clone() if step == 1 else t.position.float()
    position[..., 0] += (step * count * t.given()).to(position.dtype)
    return t._replace(position=position, order=torch.where(order == LAST, order, order + count))


def stand_before(t: Tokens, prefix: Tokens, step: float = 1.0) -> Tokens:
    """Tokens (B, N, D) and what stands before them in order and position, (B, M, D) -> (B, N + M, D), the N first.

    step: between the positions of the M.
    """
    real, sample = prefix.real(), prefix.sample()
    own = t.sample()
    size = len(t.x) if t.document is None else 1 + int(torch.cat([own, sample], 1).max())
    count = torch.zeros(size, dtype=torch.long, device=own.device).index_add(0, sample.flatten(), real.long().flatten())[own]
    moved = later(t, count, step)
    place = moved.position.new_zeros(*real.shape, t.position.shape[-1])
    place[..., 0] = (step * running(real, sample)).to(place.dtype)
    return cat([moved, prefix._replace(position=place)])
