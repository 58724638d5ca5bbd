"""Narrow float formats, exact in values: E2M1 in blocks of 16 under 8-bit scales (NVFP4), and the 8-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16  # numbers under one scale, and the size of the rotation
TOP4, TOP8 = 6.0, 448.0  # the largest numbers of E2M1 and E4M3


def e2m1(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even one; beyond 6 it is 6.

    noise: of x's shape, uniform in [0, 1): stochastic rounding, up with the share of the way that x has come; unbiased up to 6.
    """
    size = x.abs().clamp(max=TOP4)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    count = (size / step).round() if noise is None else (size / step + noise).floor()
    return (count * step).copysign(x)


def e4m3(x: Tensor) -> Tensor:
    """The nearest 8-bit float with 4 bits of exponent; beyond 448 it is 448."""
    return x.clamp(-TOP8, TOP8).to(torch.float8_e4m3fn).to(x.dtype)


def e5m2(x: Tensor) -> Tensor:
    """The nearest 8-bit float with 5 bits of exponent; beyond 57344 it is that."""
    return x.clamp(-57344, 57344).to(torch.float8_e5m2).to(x.dtype)


def nvfp4(x: Tensor, tall: int = 1, noise: Tensor | None = None) -> Tensor:
    """What (R, K) is in NVFP4: E2M1 numbers times an E4M3 scale per block of (tall, 16) times one scale of the tensor.

    NVIDIA 2025, arXiv:2509.25149, section 2 and appendix B. tall: 16 = square blocks, so that the transpose has the same values.
    noise: of x's shape, for stochastic rounding.
    """
    blocks = _blocks(x, tall)
    whole = blocks.abs().amax().clamp(min=torch.finfo(x.dtype).tiny * TOP8) / (TOP4 * TOP8)
    scale = e4m3(blocks.abs().amax((1, 3), keepdim=True) / TOP4 / whole) * whole
    safe = torch.where(scale > 0, scale, 1.0)
    found = e2m1(blocks / safe, None if noise is None else _blocks(noise, tall)) * scale
    return found.flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]]


def _blocks(x: Tensor, tall: int) -> Tensor:
    """(R, K) -> (R / tall, tall, K / 16, 16), filled up with zeros."""
    padded = F.pad(x, (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % tall))
    return padded.view(padded.shape[0] // tall, tall, padded.shape[1] // BLOCK, BLOCK)


def scaled8(x: Tensor, e5: bool = False) -> Tensor:
    """What a tensor is in 8-bit floats under one scale that brings its largest value to 448, or to 57344 with `e5`."""
    top = 57344.0 if e5 else TOP8
    scale = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny * top) / top
    return (e5m2 if e5 else e4m3)(x / scale) * scale


def rotation(signs: Tensor) -> Tensor:
    """Hadamard's matrix of size 16 over 4 with signs on its columns: (16,) of -1 and 1 -> (16, 16), orthogonal."""
    h = signs.new_ones(1, 1)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / 4 * signs


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Every 16 neighbours of a column turned: (T, K), (16, 16) -> (T filled up to a multiple of 16, K)."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % BLOCK))
    return (turn @ padded.view(-1, BLOCK, x.shape[1])).flatten(0, 1)
