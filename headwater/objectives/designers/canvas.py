"""Tokens as the signals that they were cut from: the numbers of every sample where they lie in time, height, width or frequency.

What changes a signal can then look beyond the borders of its tokens, and does not know how rows were padded or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.model import Encoder
from headwater.tokens import Tokens


class Canvas(NamedTuple):
    """All samples of a batch, L numbers along each of the P coordinates and C channels.

    x: (S, L, ..., C), 0 where nothing is. real: the same shape, True = a number of the signal. extent: (S, P), how many numbers
    each sample reaches along each coordinate. seed: (S,) int64. cell: how many of them one token has.
    """

    x: Tensor
    real: Tensor
    extent: Tensor
    seed: Tensor
    cell: tuple[int, ...]


class Layout(NamedTuple):
    """How the numbers of a token's vector lie: in row-major order along its coordinates, channels last.

    cell: how many along each coordinate; () = only the token's place in its sample is known, and every number is a channel.
    stride: what coordinates grow by from token to token. mean, std: per channel, what was taken away and divided by.
    """

    cell: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def canvas(self, t: Tokens, seed: Tensor) -> Canvas:
        """Prepared tokens (B, N, D) of the samples that have these seeds (S,)."""
        index, real, cell = self._index(t), t.real(), self.cell or (1,)
        counts = [int(i.max()) + 1 for i in index]
        sample = t.sample().where(real, len(seed))  # padding goes to a canvas of its own
        x = t.x.unflatten(-1, (*cell, -1))
        given = ~x.isnan() & real.reshape(*real.shape, *[1] * (x.ndim - 2))
        blank = x.new_zeros(len(seed) + 1, *counts, *x.shape[2:])
        seat = (sample, *index)
        laid = [
            _joined(field.index_put(seat, values)[:-1], len(cell))
            for field, values in ((blank, torch.where(given, x, 0.0)), (torch.zeros_like(blank, dtype=torch.bool), given))
        ]
        reach = torch.stack([(i + 1) * n for i, n in zip(index, cell, strict=True)], -1) * real[..., None]
        extent = x.new_zeros(len(seed) + 1, len(cell))
        where = sample.flatten()[:, None].expand(-1, len(cell))
        extent = extent.scatter_reduce(0, where, reach.flatten(0, 1).to(x.dtype), "amax")[:-1]
        return Canvas(laid[0], laid[1], extent, seed, cell)

    def tokens(self, x: Tensor, t: Tokens) -> Tokens:
        """The inverse: changed numbers (S, L, ..., C) in the tokens that they came from. What was absent is so again."""
        real, cell = t.real(), self.cell or (1,)
        cut = x
        for axis, n in enumerate(cell):
            cut = cut.unflatten(2 * axis + 1, (-1, n))
        cut = cut.permute(0, *range(1, 2 * len(cell), 2), *range(2, 2 * len(cell) + 1, 2), -1)
        found = cut[(t.sample().where(real, 0), *self._index(t))].flatten(2)
        return t._replace(x=torch.where(t.x.isnan() | ~real[..., None], t.x, found))

    def _index(self, t: Tokens) -> list[Tensor]:
        """Number of each token along each coordinate, (B, N); 0 for padding."""
        if not self.cell:
            return [t.place() * t.real()]
        return [t.position[..., k].long() * t.real() // step for k, step in enumerate(self.stride)]


def layout_of(encoder: Encoder) -> Layout:
    """As the reader cuts pictures, films, spectrograms, series and actions; of anything else only the order is known."""
    reader: Any = encoder.reader
    if hasattr(encoder, "tokeniser"):
        return Layout()  # prepared tokens are codes, not what the reader cut
    if hasattr(reader, "tubelet"):
        return Layout((reader.tubelet, reader.patch, reader.patch), (reader.tubelet, 1, 1), (0.5,) * 3, (0.5,) * 3)
    if hasattr(reader, "patch") and hasattr(reader, "interpolation"):
        return Layout((1, reader.patch, reader.patch), (1, 1, 1), reader.mean, reader.std)
    if hasattr(reader, "bands") and hasattr(reader, "height"):
        return Layout((reader.frames, reader.height), (1, 1))
    if hasattr(reader, "joint"):
        return Layout((reader.steps, 1), (1, 1))
    return Layout((reader.chunk,), (reader.chunk,)) if hasattr(reader, "chunk") else Layout()


def _joined(x: Tensor, axes: int) -> Tensor:
    """(S, tokens along each axis, numbers of a token along each, C) -> (S, numbers along each, C)."""
    x = x.permute(0, *(n for axis in range(axes) for n in (1 + axis, 1 + axes + axis)), -1)
    for axis in range(axes):
        x = x.flatten(1 + axis, 2 + axis)
    return x
