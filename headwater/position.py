"""How coordinates enter a trunk: added to the tokens, turning queries and keys, or lowering the scores of what is far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import TABLE, Rule
from headwater.spec import Described
from headwater.tokens import Tokens


class Position(nn.Module, Described):
    """Uses no coordinate; the others override one of its three ways in.

    Coordinate 0 is time or reading order; pictures have (time, row, column). Appended tokens have no place: they are not
    added to, and do not turn.
    """

    def fit(self, width: int, heads: int) -> None:
        """Called once by the trunk: make what depends on D and the number of heads."""

    def add(self, t: Tokens) -> Tensor | None:
        """(B, N, D), added to the tokens before the first block."""
        return None

    def angle(self, t: Tokens, size: int) -> Tensor | None:
        """(B, 1, N, size // 2), by which the pairs of each head's queries and keys turn. size: d of a head."""
        return None

    def bias(self, q: Tokens, k: Tokens) -> Tensor | None:
        """(B, H, Q, K), added to the scores."""
        return None


class Sincos(Position):
    """Sines and cosines of every coordinate (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        base: the longest wavelength is 2 pi times this.
    """

    def __init__(self, base: float = 1e4) -> None:
        super().__init__()
        self.base = base

    def fit(self, width: int, heads: int) -> None:
        self.width = width

    def add(self, t: Tokens) -> Tensor:
        return sincos(t.position, self.width, self.base)


class Rotary(Position):
    """Rotation by each coordinate (RoFormer, Su et al. 2021, arXiv:2104.09864): the pairs of a head are dealt to the axes.

    Args:
        base: the slowest pair turns by 1 / base per token.
        axes: coordinates that are used; None = all.
        span: tokens along each of the axes. Coordinates are then put between -1 and 1 over so many tokens, and turn by 2 pi
            (DINOv3, Simeoni et al. 2025, arXiv:2508.10104). None = coordinates are in tokens.
        stretch: coordinates are divided by it, so that the places of a longer context fall between those that were learned
            (position interpolation, Chen et al. 2023, arXiv:2306.15595).
    """

    def __init__(
        self, base: float = 1e4, axes: Sequence[int] | None = None, span: Sequence[int] | None = None, stretch: float = 1.0
    ) -> None:
        super().__init__()
        if stretch <= 0:
            raise ValueError(f"found a stretch of {stretch}; expected a factor above 0, such as 4 for four times the context")
        if span is not None and len(span) != len(axes or ()):
            raise ValueError(f"found span {span} for axes {axes}; expected one number of tokens per axis")
        self.base, self.axes, self.span, self.stretch = base, axes, span, stretch

    def angle(self, t: Tokens, size: int) -> Tensor:
        place = t.position if self.axes is None else t.position[..., list(self.axes)]
        place = place if self.stretch == 1 else place.float() / self.stretch
        if self.span is not None:
            place = 2 * math.pi * (2 * (place.float() + 0.5) / place.new_tensor(self.span, dtype=torch.float32) - 1)
        return rotary(place, size, self.base)


class Learned(Position):
    """A table of learned vectors, one per place of a grid, or per place of each axis.

    Args:
        sizes: how many places each of the used coordinates has.
        axes: coordinates that are used; None = the last ones, as many as `sizes` has.
        factorised: one table per axis, summed, so that any grid up to these sizes has its own code (NaViT, Dehghani et al.
            2023, arXiv:2307.06304). Else one vector per cell of the whole grid.
    """

    def __init__(self, sizes: Sequence[int], axes: Sequence[int] | None = None, factorised: bool = False) -> None:
        super().__init__()
        if axes is not None and len(axes) != len(sizes):
            raise ValueError(f"found axes {axes} for sizes {sizes}; expected one axis per size")
        self.sizes, self.axes, self.factorised = tuple(sizes), axes, factorised

    def fit(self, width: int, heads: int) -> None:
        self.table = nn.Parameter(torch.empty(sum(self.sizes) if self.factorised else math.prod(self.sizes), width))

    def init_rules(self) -> dict[str, Rule]:
        return {"table": TABLE}

    def add(self, t: Tokens) -> Tensor:
        place = t.position[..., -len(self.sizes) :] if self.axes is None else t.position[..., list(self.axes)]
        if place.shape[-1] < len(self.sizes):
            raise ValueError(f"found tokens with {t.position.shape[-1]} coordinates; the table of positions has {self.sizes}")
        index, sizes = place.long(), place.new_tensor(self.sizes, dtype=torch.long)
        self._within(index, sizes)
        if self.factorised:
            starts = F.pad(sizes.cumsum(0)[:-1], (1, 0))
            return self.table[index + starts].sum(-2)
        return self.table[(index * F.pad(sizes.flip(0).cumprod(0).flip(0)[1:], (0, 1), value=1)).sum(-1)]

    def _within(self, place: Tensor, sizes: Tensor) -> None:
        """A place beyond the table would read another cell's vector. A GPU checks without being waited for."""
        if place.is_cuda:
            torch._assert_async((place < sizes).all(), f"a token lies beyond the table of positions {self.sizes}")
        elif not torch.compiler.is_compiling() and bool((place >= sizes).any()):
            most = (place.flatten(0, -2).amax(0) + 1).tolist()
            raise ValueError(f"found tokens on a grid of {most}; the table of positions has {list(self.sizes)}")


class Alibi(Position):
    """Scores fall by the distance, at another rate in every head (Press et al. 2021, arXiv:2108.12409).

    With several coordinates the distance is Euclidean. The bias is as large as queries times keys.
    """

    def fit(self, width: int, heads: int) -> None:
        self.heads = heads

    def bias(self, q: Tokens, k: Tokens) -> Tensor:
        slope = 2.0 ** (-8 / self.heads * torch.arange(1, self.heads + 1, device=q.position.device))
        apart = torch.cdist(q.position.float(), k.position.float())
        apart = apart * (q.given()[:, :, None] & k.given()[:, None, :])
        return -slope[:, None, None] * apart[:, None]


NAMED = {"none": Position, "sincos": Sincos, "rotary": Rotary, "alibi": Alibi}


def sincos(position: Tensor, width: int, base: float = 1e4) -> Tensor:
    """Sines and cosines of every coordinate. position: (..., P) -> (..., width), zero-padded where P does not divide."""
    each = width // position.shape[-1] // 2 * 2
    frequency = torch.exp(-math.log(base) * torch.arange(0, each, 2, device=position.device) / max(each, 1))
    angle = position[..., None].float() * frequency
    code = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
    return F.pad(code, (0, width - code.shape[-1]))


def rotary(position: Tensor, size: int, base: float = 1e4) -> Tensor:
    """Rotation angles over any number of axes. position: (B, N, P) -> (B, 1, N, size // 2).

    The pairs of a head are dealt to the axes in equal runs; pairs left over do not turn.
    """
    each = size // 2 // position.shape[-1]
    frequency = torch.exp(-math.log(base) * torch.arange(each, device=position.device) / max(each, 1))
    angle = (position[..., None].float() * frequency).flatten(-2)
    return F.pad(angle, (0, size // 2 - angle.shape[-1]))[:, None]


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + size/2]). x: (B, H, N, size); turn: cosine and sine of the angles, (B, 1, N, size // 2)."""
    (a, b), (cos, sin) = x.chunk(2, -1), (part.to(x.dtype) for part in turn)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
