"""Random numbers as a pure function of (seed, name): a counter hash, never a global generator.

The same sample draws the same numbers whatever its row, its rank, the padding beside it or the batch around it.
The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), in wrapping 64-bit integers on any device.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headwater.tokens import Tokens

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: int64's own keeps the sign


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def fold(seed: Tensor, number: Tensor | int | str) -> Tensor:
    """A new int64 seed from a seed and a number or name; shapes broadcast."""
    if isinstance(number, str):
        number = zlib.crc32(number.encode())
    return _mix((seed + 1) * _GOLDEN + _mix(torch.as_tensor(number, dtype=torch.int64, device=seed.device) * _GOLDEN))


def seed_of(*numbers: int) -> int:
    """One non-negative 63-bit seed from several integers: `fold` from 0 on, in plain integers, because loaders ask it often."""
    seed = 0
    for number in numbers:
        seed = _mix_int(((seed + 1) * _GOLDEN + _mix_int(number * _GOLDEN & _WORD)) & _WORD)
    return seed & (_WORD >> 1)


def seeds_of(*numbers: np.ndarray | int) -> np.ndarray:
    """The same for whole columns: (K,) integers, or one for all -> (K,) int64."""
    seed = np.zeros(1, np.uint64)
    for number in numbers:
        other = mix(np.atleast_1d(np.asarray(number, np.int64)).astype(np.uint64) * np.uint64(_GOLDEN & _WORD))
        seed = mix((seed + np.uint64(1)) * np.uint64(_GOLDEN & _WORD) + other)
    return (seed & np.uint64(_WORD >> 1)).astype(np.int64)


def _mix_int(x: int) -> int:
    x = (x ^ x >> 30) * _FIRST & _WORD
    x = (x ^ x >> 27) * _SECOND & _WORD
    return x ^ x >> 31


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 for (K,) uint64: equal sums of it mean equal parts, but for chance."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(_FIRST & _WORD)
    x = (x ^ x >> np.uint64(27)) * np.uint64(_SECOND & _WORD)
    return x ^ x >> np.uint64(31)


def uniform(seed: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Numbers in [0, 1), float32 of shape seed.shape + shape."""
    counter = torch.arange(math.prod(shape), device=seed.device).reshape(tuple(shape))
    draws = fold(fold(seed, name).reshape(seed.shape + (1,) * len(shape)), counter)
    return _shift(draws, 40).to(torch.float32) / (1 << 24)


def uniform_of(seed: int, shape: Sequence[int], name: str) -> np.ndarray:
    """`uniform` of one seed, the same numbers bit for bit: readers ask often, and torch is slow at a few numbers."""
    named = _mix_int(((seed + 1) * _GOLDEN + _mix_int(zlib.crc32(name.encode()) * _GOLDEN & _WORD)) & _WORD)
    counter = mix(np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(_GOLDEN & _WORD))
    draws = mix(np.uint64((named + 1) * _GOLDEN & _WORD) + counter) >> np.uint64(40)
    return draws.astype(np.float32).reshape(tuple(shape)) / np.float32(1 << 24)


def normal(seed: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Standard normal numbers by Box and Muller's transform, float32 of shape seed.shape + shape."""
    radius = (-2 * torch.log1p(-uniform(seed, shape, name))).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(seed, shape, f"{name}/angle"))


def gumbel(seed: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Standard Gumbel numbers, float32 of shape seed.shape + shape: the largest of logits plus these draws from their softmax."""
    return -(-uniform(seed, shape, name).clamp(min=2**-25).log()).log()  # no draw is 0, and none is 1


def token_seed(seed: Tensor, t: Tokens) -> Tensor:
    """(B, N) one seed per token from the seeds (S,) of its sample and its place there: packing and padding do not matter."""
    return fold(seed[t.sample()], t.place())
