"""Changes of a signal with learned strengths: colour, level, noise, blur, zoom, erased boxes, dropped tokens.

Each is a differentiable function of its strengths from 0, nothing changes, to 1, the most that its arguments allow. What is drawn
comes from the seeds of the samples and the places of the numbers; so it does not matter how rows are packed, padded, or dealt to
ranks. Mixing samples (mixup) is left out: the partner of a sample may lie in another piece of the batch or on another rank.

Resampling is a matrix along each coordinate: torch's own grid_sample has no second derivative, which the oracle takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from headwater import random
from headwater.objectives.designers.canvas import Canvas, Layout


class Change:
    """Plain values only, so that recipes can spell them out.

    knobs: a name for each strength. moves: what is seen changes its place, so that labels of places would no longer fit.
    axes: the coordinates that it works on, as in the policies of masks: [1, 2] rows and columns of pictures and films, [0, 1]
    time and frequency of a spectrogram; None = all of them.
    """

    knobs: ClassVar[tuple[str, ...]] = ("strength",)
    moves: ClassVar[bool] = False

    def __init__(self, axes: Sequence[int] | None = None) -> None:
        self.axes = axes

    def check(self, layout: Layout) -> None:
        """ValueError where signals of this layout cannot be changed so."""
        known = max(1, len(layout.cell))
        if self.axes is not None and (not self.axes or not set(self.axes) <= set(range(known))):
            raise ValueError(f"found {type(self).__name__} with axes {[*self.axes]}; expected some of 0 to {known - 1}")

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        """Changed numbers (S, L, ..., C). strength: (knobs,) from 0 to 1; name: of the draws."""
        raise NotImplementedError(f"{type(self).__name__} must return changed numbers")

    def along(self, canvas: Canvas) -> list[int]:
        """The coordinates that it works on."""
        return [*range(len(canvas.cell))] if self.axes is None else [*self.axes]


class Colour(Change):
    """Brightness, contrast, saturation and hue of a sample, with a strength each.

    The first three are factors between 1 - most * strength and 1 + most * strength on the value, its distance from the sample's
    mean grey, and its distance from its own grey, as in SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix A); the last one
    turns colours about the grey axis by up to pi * strength. Values are not clipped, so that gradients go through.

    Args:
        most: see above.
    """

    knobs = ("brightness", "contrast", "saturation", "hue")

    def __init__(self, most: float = 0.8) -> None:
        super().__init__()
        if not 0 < most <= 1:
            raise ValueError(f"found most={most}; expected above 0 and up to 1, since factors must not fall below 0")
        self.most = most

    def check(self, layout: Layout) -> None:
        if len(layout.mean) != 3:
            raise ValueError("found Colour of a signal that is no picture or film in three colours; use Level for its loudness")

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        draw = 2 * random.uniform(canvas.seed, (4,), name).to(canvas.x) - 1
        light, contrast, colour = (spread(1 + self.most * strength[k] * draw[:, k], canvas.x) for k in range(3))
        mean, std = (canvas.x.new_tensor(part) for part in (layout.mean, layout.std))
        x = (canvas.x * std + mean) * light
        middle = mean_of(grey(x), canvas.real[..., :1])
        x = middle + (x - middle) * contrast
        dull = grey(x)
        x = dull + (x - dull) * colour
        turn = hue(math.pi * strength[3] * draw[:, 3])
        x = torch.einsum("sab,s...b->s...a", turn, x)
        return (x - mean) / std


class Level(Change):
    """x e^(scale * u) + shift * v with u, v drawn per sample from [-1, 1]: loudness, in a spectrogram of logarithms by `shift` and
    in a wave by `scale`; offset and size of actions.

    Args:
        scale, shift: the most of both, in units of what encoders see.
    """

    knobs = ("scale", "shift")

    def __init__(self, scale: float = 1.0, shift: float = 1.0) -> None:
        super().__init__()
        self.most = (limit("scale", scale), limit("shift", shift))

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        draw = 2 * random.uniform(canvas.seed, (2,), name).to(canvas.x) - 1
        scale, shift = (spread(self.most[k] * strength[k] * draw[:, k], canvas.x) for k in range(2))
        return canvas.x * scale.exp() + shift


class Noise(Change):
    """Normal noise of deviation most * strength on every number.

    Args:
        most: in units of what encoders see, whose deviation is about 1.
    """

    def __init__(self, most: float = 1.0) -> None:
        super().__init__()
        self.most = limit("most", most)

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        seed = canvas.seed
        for number in canvas.x.shape[1:-2]:
            seed = random.fold(seed[..., None], torch.arange(number, device=seed.device))
        return canvas.x + self.most * strength * random.normal(seed, canvas.x.shape[-2:], name).to(canvas.x)


class Blur(Change):
    """A Gaussian along some coordinates, of a deviation drawn per sample up to most * strength. Along time: motion blur.

    What is not there has no part in it.

    Args:
        most: largest deviation, in numbers: pixels, frames, bands.
        axes: see Change.
    """

    def __init__(self, most: float = 2.0, axes: list[int] | None = None) -> None:
        super().__init__(axes)
        self.most = limit("most", most)

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        width = self.most * strength * random.uniform(canvas.seed, (), name).to(canvas.x)
        return resampled(canvas, {axis: gaussian(width, canvas.x.shape[1 + axis]) for axis in self.along(canvas)})


class Zoom(Change):
    """A part of the signal, drawn per sample, in the places of the whole: its sides are 1 - (1 - least) * strength * u of all.

    Along the time of a sound or a film it slows down, along frequency it shifts and widens voices.

    Args:
        least: the smallest share of a side.
        axes: see Change.
    """

    moves = True

    def __init__(self, least: float = 0.25, axes: list[int] | None = None) -> None:
        super().__init__(axes)
        if not 0 < least < 1:
            raise ValueError(f"found least={least}; expected a share of a side above 0 and below 1")
        self.least = least

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        axes = self.along(canvas)
        draw = random.uniform(canvas.seed, (1 + len(axes),), name).to(canvas.x)
        side = 1 - (1 - self.least) * strength * draw[:, 0]
        maps = {}
        for where, axis in zip(draw[:, 1:].unbind(1), axes, strict=True):
            maps[axis] = window(side, where, canvas.extent[:, axis], canvas.x.shape[1 + axis])
        return resampled(canvas, maps)


class Erase(Change):
    """Boxes that become the mean of their sample; a number on the edge becomes it by the share that the box covers.

    A box is bounded along `axes` and has no end along others: with [0] a strip of time, with [1] one of frequency (SpecAugment,
    Park et al. 2019, arXiv:1904.08779), with [1, 2] on pictures random erasing (Zhong et al. 2017, arXiv:1708.04896).

    Args:
        most: largest share of a side that a box has.
        count: boxes.
        axes: see Change.
    """

    def __init__(self, most: float = 0.5, count: int = 1, axes: list[int] | None = None) -> None:
        super().__init__(axes)
        if not 0 < most <= 1 or count < 1:
            raise ValueError(f"found most={most} and count={count}; expected a share above 0 and up to 1, and 1 box or more")
        self.most, self.count = most, count

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        axes = self.along(canvas)
        draw = random.uniform(canvas.seed, (self.count, len(axes), 2), name).to(canvas.x)
        kept = torch.ones_like(canvas.x)
        for box in draw.unbind(1):
            share = torch.ones_like(canvas.x)
            for axis, (where, size) in zip(axes, box.movedim(0, -1), strict=True):
                extent, length = canvas.extent[:, axis], canvas.x.shape[1 + axis]
                cover = covered(where * extent, self.most * strength * size * extent, length)
                share = share * cover.reshape(len(cover), *(length if n == axis else 1 for n in range(len(canvas.cell))), 1)
            kept = kept * (1 - share)
        return toward_mean(canvas, kept)


class Drop(Change):
    """Tokens that become the mean of their sample, each with the probability most * strength; the choice is soft.

    The share of a token that goes is sigmoid((logit(rate) + logit(u)) / temperature) (Concrete dropout, Gal et al. 2017,
    arXiv:1705.07832, equation 5): nearly 0 or 1, and a function of the rate that has a gradient.

    Args:
        most: largest rate.
        temperature: of the choice.
        axes: tokens that share these coordinates go together: with [0] steps, frames or moments. None = each by itself.
    """

    def __init__(self, most: float = 0.5, temperature: float = 0.1, axes: list[int] | None = None) -> None:
        super().__init__(axes)
        if not 0 < most < 1:
            raise ValueError(f"found most={most}; expected a rate above 0 and below 1")
        self.most, self.temperature = most, limit("temperature", temperature)

    def __call__(self, canvas: Canvas, strength: Tensor, layout: Layout, name: str) -> Tensor:
        seed, along = canvas.seed, self.along(canvas)
        for axis, n in enumerate(canvas.cell):
            number = torch.arange(canvas.x.shape[1 + axis], device=seed.device) // n
            seed = random.fold(seed[..., None], number if axis in along else 0 * number)
        rate = (self.most * strength).clamp(min=1e-30)  # below it the gradient would be 0 times infinity
        draw = random.uniform(seed, (), name).to(canvas.x).clamp(min=1e-7)
        gone = torch.sigmoid((rate.log() - (-rate).log1p() + draw.logit()) / self.temperature)
        return toward_mean(canvas, 1 - gone[..., None])


def limit(name: str, value: float) -> float:
    """The value, if it is above 0."""
    if value <= 0:
        raise ValueError(f"found {name}={value}; expected a number above 0, what strength 1 stands for")
    return value


def spread(value: Tensor, x: Tensor) -> Tensor:
    """(S,) so that it meets (S, L, ..., C)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def mean_of(x: Tensor, real: Tensor) -> Tensor:
    """The mean of each sample and channel over what is real: (S, L, ..., C) -> (S, 1, ..., C)."""
    axes = [*range(1, x.ndim - 1)]
    return (x * real).sum(axes, keepdim=True) / real.sum(axes, keepdim=True).clamp(min=1)


def toward_mean(canvas: Canvas, kept: Tensor) -> Tensor:
    """What is kept of the distance from the mean. kept: (S, L, ..., C or 1) from 0 to 1."""
    fill = mean_of(canvas.x, canvas.real)
    return canvas.x + (fill - canvas.x) * (1 - kept)


def grey(x: Tensor) -> Tensor:
    """Luma of red, green and blue (ITU-R BT.601): (..., 3) -> (..., 1)."""
    return (x * x.new_tensor((0.299, 0.587, 0.114))).sum(-1, keepdim=True)


def hue(angle: Tensor) -> Tensor:
    """Turns colours about the grey axis by Rodrigues' formula: (S,) radians -> (S, 3, 3)."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    same, cross = angle.new_ones(3).diag(), angle.new_tensor(((0, -1, 1), (1, 0, -1), (-1, 1, 0))) / math.sqrt(3)
    return cos * same + sin * cross + (1 - cos) / 3


def gaussian(width: Tensor, length: int) -> Tensor:
    """Each number becomes a mean of its neighbours: deviations (S,) -> (S, length, length), rows with sum 1."""
    place = torch.arange(length, device=width.device, dtype=width.dtype)
    away = (place[:, None] - place).square()
    weight = torch.exp(-away / (2 * width.square()[:, None, None] + 1e-6))
    return weight / weight.sum(-1, keepdim=True)


def window(side: Tensor, where: Tensor, extent: Tensor, length: int) -> Tensor:
    """Linear interpolation in a window of side * extent numbers, which begins at the share `where` of what is left.

    All (S,) -> (S, length, length).
    """
    place = torch.arange(length, device=side.device, dtype=side.dtype)
    first, side, extent = ((1 - side) * extent * where)[:, None], side[:, None], extent[:, None]
    source = (first + side * (place + 0.5) - 0.5).clamp(min=0).minimum((extent - 1).clamp(min=0))
    return (1 - (source[..., None] - place).abs()).clamp(min=0)


def covered(centre: Tensor, width: Tensor, length: int) -> Tensor:
    """The share of each number, one unit wide, that a strip covers: (S,), (S,) -> (S, length)."""
    place = torch.arange(length, device=centre.device, dtype=centre.dtype)
    low, high = ((centre + side * width / 2)[:, None] for side in (-1, 1))
    return (high.minimum(place + 1) - low.maximum(place)).clamp(min=0)


def resampled(canvas: Canvas, maps: Mapping[int, Tensor]) -> Tensor:
    """Coordinate -> weights (S, L, L): numbers (S, L, ..., C) become weighted means along each of them of what is real."""
    there = canvas.real.to(canvas.x.dtype)
    x = canvas.x * there  # other changes have left numbers where nothing is
    for axis, weight in maps.items():
        x, there = through(weight, x, 1 + axis), through(weight, there, 1 + axis)
    return torch.where(there > 1e-3, x / there.clamp(min=1e-3), canvas.x)


def through(weight: Tensor, x: Tensor, dim: int) -> Tensor:
    """Matrices (S, L, L) times one dimension, of L numbers, of x (S, ...)."""
    first = x.movedim(dim, 1)
    return (weight @ first.flatten(2)).view(first.shape).movedim(1, dim)
