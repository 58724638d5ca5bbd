"""The one transformer trunk, used by encoders, fusion blocks and decoders.

Parameter names follow timm's VisionTransformer (blocks.0.attn.qkv.weight), so its weights load without a table.
Pre-norm blocks; positions are added here from `Tokens.position`, so whoever makes a token need not know about them.
Conditioning is DiT's adaLN-Zero (Peebles and Xie 2023, arXiv:2212.09748; https://github.com/facebookresearch/DiT).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.spec import Described
from headwater.tokens import Mask, Tokens, attention_mask


def sincos(position: Tensor, width: int, base: float = 1e4) -> Tensor:
    """Sines and cosines of every coordinate. position: (..., P) -> (..., width), zero-padded where P does not divide."""
    each = width // position.shape[-1] // 2 * 2
    frequency = torch.exp(-math.log(base) * torch.arange(0, each, 2, device=position.device) / max(each, 1))
    angle = position[..., None].float() * frequency
    code = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
    return F.pad(code, (0, width - code.shape[-1]))


def rotary(position: Tensor, dim: int, base: float = 1e4) -> Tensor:
    """Rotation angles for rotary positions over any number of axes. position: (B, N, P) -> (B, 1, N, dim // 2).

    The pairs of a head are dealt to the axes in equal runs; pairs left over do not turn. RoFormer (arXiv:2104.09864).
    """
    each = dim // 2 // position.shape[-1]
    frequency = torch.exp(-math.log(base) * torch.arange(each, device=position.device) / max(each, 1))
    angle = (position[..., None].float() * frequency).flatten(-2)
    return F.pad(angle, (0, dim // 2 - angle.shape[-1]))[:, None]


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + dim/2]) by `angle`. x: (B, H, N, dim); angle: (B, 1, N, dim // 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """Multi-head self-attention. x: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Mask, angle: Tensor | None) -> Tensor:
        """angle: rotation of rotary positions, or None."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, is_causal=mask.causal)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two linear layers with GELU between. x: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; with `conditional` its norms are scaled, shifted and gated by a condition."""

    def __init__(self, width: int, heads: int, hidden: int, conditional: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.modulation = nn.Linear(width, 6 * width) if conditional else None

    def forward(self, x: Tensor, mask: Mask, angle: Tensor | None, condition: Tensor | None) -> Tensor:
        """x: (B, N, D); condition: (B, N or 1, D) or None."""
        if self.modulation is None or condition is None:
            x = x + self.attn(self.norm1(x), mask, angle)
            return x + self.mlp(self.norm2(x))
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        x = x + (1 + gate1) * self.attn(self.norm1(x) * (1 + scale1) + shift1, mask, angle)
        return x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Trunk(nn.Module, Described):
    """A stack of blocks over Tokens of any modality.

    Args:
        width: D, the size of every token.
        depth: number of blocks.
        heads: attention heads; None = one per 64 of width.
        position: how `Tokens.position` enters: sines added at the input, rotation inside attention, or not at all.
        mlp_ratio: hidden size of the feed-forward layer over width.
        conditional: build the layers that take a `condition` (diffusion time, labels).
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 4,
        heads: int | None = None,
        position: Literal["sincos", "rotary", "none"] = "sincos",
        mlp_ratio: float = 4.0,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        heads = heads or max(1, width // 64)
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} over {heads} heads leaves {width / heads} per head; expected an even whole number")
        self.width, self.heads, self.position, self.conditional = width, heads, position, conditional
        self.blocks = nn.ModuleList(Block(width, heads, int(width * mlp_ratio), conditional) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights: normal of std 0.02 cut at two deviations, biases zero; modulation all zero (the plain block)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name.endswith("modulation"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        """t.x: (B, N, D); condition: (B, N or 1, D). Tokens that are not valid come out finite and mean nothing."""
        if condition is not None and not self.conditional:
            raise ValueError("this trunk was built without conditioning, but a condition came in; set `conditional: true` on it")
        x, angle = t.x, None
        if self.position == "sincos":
            x = x + sincos(t.position, self.width).to(x.dtype)
        elif self.position == "rotary":
            angle = rotary(t.position, self.width // self.heads)
        mask = attention_mask(t, t, causal)
        condition = None if condition is None else condition.to(x.dtype)
        for block in self.blocks:
            x = block(x, mask, angle, condition)
        return t._replace(x=self.norm(x))
