"""Time series of many channels (brain waves, sensors, prices) as patches with (time, channel) coordinates.

A token per channel and patch as in PatchTST (Nie et al. 2022, arXiv:2211.14730; for EEG LaBraM, Jiang et al. 2024,
arXiv:2405.18765), or all channels of a moment in one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater import random
from headwater.modalities.action import array
from headwater.modalities.image import grid
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class SeriesReader(Reader):
    """An .npy array (T, C), a row per moment -> patches of `steps` moments; order is the patch's number, as its time is.

    NaN is an absent value: a gap, an electrode that this recording lacks (keep its column), columns missing at the end, the
    rest of the last patch. A patch without any value is no token. All recordings have one rate: an array has none.
    A random view keeps 60 to 100 % of the time.

    Args:
        channels: the most columns.
        steps: moments per patch.
        length: the most moments that are read, from the start or, in a random view, from a random one.
        joint: a token holds all channels of its patch; else every channel has tokens of its own.
        scale: values are divided by it. None = every channel of every sample gets mean 0 and deviation 1 over what is read of
            it. Both are then lost to the model, and `restore` gives deviations. They know the future: to forecast, give a scale.
    """

    extensions = ("series.npy", "npy")

    def __init__(
        self, channels: int = 1, steps: int = 16, length: int = 1024, joint: bool = False, scale: float | None = None
    ) -> None:
        if min(channels, steps, length) < 1 or (scale is not None and scale <= 0):
            raise ValueError(f"found channels={channels}, steps={steps}, length={length}, scale={scale}; expected all above 0")
        self.channels, self.steps, self.most, self.joint, self.scale = channels, steps, length, joint, scale
        self.features = steps * channels if joint else steps

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        return array(members[str(self.member(members))])

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        series = self._window(self._rows(signal), view)
        series = standard(series) if self.scale is None else series / self.scale
        count = math.ceil(len(series) / self.steps)
        x = np.full((count * self.steps, self.channels), np.nan, np.float32)
        x[: len(series), : series.shape[1]] = series
        cut = torch.from_numpy(x).unflatten(0, (count, self.steps))
        every = (cut if self.joint else cut.transpose(1, 2)).reshape(-1, self.features)
        found = ~every.isnan().all(1)
        if not found.any():
            raise ValueError("no channel of the series has a value in what is read of it")
        position = grid(count, 1 if self.joint else self.channels)[found]
        return Tokens(every[found], position, order=position[:, 0].long())

    def _rows(self, signal: Any) -> np.ndarray:
        """Whatever came in as float64 (T, C)."""
        series = np.asarray(signal)
        series = series[:, None] if series.ndim == 1 else series
        if series.dtype.kind not in "fiu" or series.ndim != 2 or not series.size or series.shape[1] > self.channels:
            raise ValueError(
                f"found a series of {series.dtype} {series.shape}; expected numbers (T, up to {self.channels}), a row per moment"
            )
        if np.isinf(series).any():
            raise ValueError("the series holds infinite values; mark what is absent as NaN")
        return series.astype(np.float64)  # a mean of 1e9 would eat the signal of a float32

    def _window(self, series: np.ndarray, view: View | None) -> np.ndarray:
        """At most `most` rows."""
        count = min(len(series), self.most)
        if view is None:
            return series[:count]
        share, late = view.uniform((2,), "window").tolist()
        count = max(1, round(view.part(share, (0.6, 1.0)) * count))
        start = round(late * (len(series) - count))
        return series[start : start + count]

    def length(self, facts: dict[str, float]) -> int | None:
        """From "steps", the rows of the array; too large by the tokens without a value."""
        if "steps" not in facts:
            return None
        return math.ceil(min(int(facts["steps"]), self.most) / self.steps) * (1 if self.joint else self.channels)

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32))

    def restore(self, t: Tokens) -> np.ndarray:
        """float32 (T, channels), NaN where there is no token; rows without a value at the end are left out."""
        real = t.real()[0]
        time, channel = t.position[0][real].long().cpu().T[:2]
        x = torch.full((int(time.max()) + 1, 1 if self.joint else self.channels, self.features), math.nan)
        x[time, channel] = t.x[0][real].float().cpu()
        rows = (x if self.joint else x.transpose(1, 2)).reshape(-1, self.channels).numpy()
        end = np.flatnonzero(~np.isnan(rows).all(1)).max(initial=-1) + 1
        return rows[:end] * np.float32(self.scale or 1)

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.normal(torch.tensor(seed), (n, 3 * self.steps, self.channels), "series").numpy()
        return [self.tokens(d[: self.steps * (2 + k % 2) - k % 3, : max(1, self.channels - k % 2)]) for k, d in enumerate(draws)]


class Series(Encoder):
    """A transformer over patches of time series.

    Args:
        trunk: the transformer.
        channels: the most columns of a recording.
        steps: moments per patch.
        length: the most moments that are read.
        joint: one token for all channels of a patch.
        scale: values are divided by it; None = each channel of each sample gets mean 0 and deviation 1.
        pooling: how tokens become one vector; see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        channels: int = 1,
        steps: int = 16,
        length: int = 1024,
        joint: bool = False,
        scale: float | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(SeriesReader(channels, steps, length, joint, scale), trunk, pooling)
        self.stem = Slots(self.features, trunk.width)


class Slots(nn.Linear):
    """Vectors whose absent slots are NaN -> vectors: linear in the values that are present and in flags of which these are.

    x: (..., features) -> (..., width).
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__(2 * features, width)

    def forward(self, x: Tensor) -> Tensor:
        present = ~x.isnan()
        return super().forward(torch.cat([x.masked_fill(~present, 0), present.to(x.dtype)], -1))


def standard(series: np.ndarray) -> np.ndarray:
    """(T, C) with mean 0 and deviation 1 of every column's present values; a column that never changes becomes 0."""
    present = ~np.isnan(series)
    count = present.sum(0).clip(min=1)
    mean = np.where(present, series, 0).sum(0) / count
    away = series - mean
    spread = np.sqrt((np.where(present, away, 0) ** 2).sum(0) / count)
    changes = spread > 1e-9 * np.abs(mean)  # less is rounding of the mean
    return away * changes / np.where(changes, spread, 1)
