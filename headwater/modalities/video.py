"""Moving pictures as tubelets with (frame, row, column) coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from headwater import random
from headwater.modalities import decoding
from headwater.modalities.factorised import factorised
from headwater.modalities.films import TICK, Film
from headwater.modalities.image import grid, patches, rgb
from headwater.modalities.scaling import crop, fit, recolour
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class VideoReader(Reader):
    """A video file -> at most `frames` frames, size x size -> tubelets of tubelet x patch x patch pixels.

    Frames are taken by number, every `stride`-th, or with `rate` by the time at which they are on screen, whatever the file's
    own frame rate. A random view starts at a random moment from which the clip still fits; else a clip starts at 0. A view's
    share is that of the area, the whole unless it names one, and its strength changes all frames alike. Only the frames that
    are taken, and those between them and the keyframe before, are decoded.

    Position: (number of the tubelet's last frame, row, column), frames counted as they were taken. Order is that number too:
    the patches of one moment see each other, and in causal attention a step sees the frames up to its own.

    Args:
        size: pixels of a frame's longer side; the rest becomes white.
        patch: pixels per tubelet side.
        frames: the most frames of a clip.
        stride: every how many frames one is taken.
        tubelet: frames per tubelet; the last frame is repeated to fill one.
        rate: frames per second to take, in place of stride.
    """

    extensions = ("mp4", "webm", "mkv", "avi", "mov")

    def __init__(
        self, size: int = 64, patch: int = 8, frames: int = 16, stride: int = 1, tubelet: int = 1, rate: float | None = None
    ) -> None:
        if size % patch:
            raise ValueError(
                f"frame size {size} is not a multiple of patch {patch}; choose for example size {size // patch * patch}"
            )
        if rate is not None and (rate <= 0 or stride != 1):
            raise ValueError(f"found rate={rate} and stride={stride}; give a rate above 0 or a stride, not both")
        self.size, self.patch, self.frames, self.stride, self.tubelet, self.rate = size, patch, frames, stride, tubelet, rate
        self.features = tubelet * patch * patch * 3

    def decode(self, members: dict[str, bytes]) -> Film:
        """The file, opened and found whole; `tokens` decodes the frames that it takes."""
        return decoding.backend("video")(members[str(self.member(members))])

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        """signal: a Film, or frames that were taken already: uint8 (T, H, W, 3) or a list of pictures."""
        start = 0.0 if view is None else view.uniform((1,), "start").item()
        taken = self._take(signal, start) if isinstance(signal, Film) else self._cut(signal, start)
        size, shown = self.size, [rgb(frame) for frame in taken]
        if view is not None:
            size = max(1, round(view.scale * self.size / self.patch)) * self.patch
            shown = [recolour(crop(frame, view, (1.0, 1.0)), view) for frame in shown]
        frames = np.stack([fit(frame, size) for frame in shown])
        if missing := -len(frames) % self.tubelet:
            frames = np.concatenate([frames, frames[-1:].repeat(missing, 0)])
        position, order = tubes(len(frames) // self.tubelet, size // self.patch, self.tubelet)
        return Tokens(patches(frames, self.tubelet, self.patch), position, order=order)

    def _take(self, film: Film, start: float) -> list[np.ndarray]:
        """The frames of a clip. start: 0 = as early as possible, 1 = as late as the clip still fits."""
        count = self._count(film.frames, film.seconds)
        if self.rate is not None:
            late = start * max(0.0, film.seconds - TICK - (count - 1) / self.rate)
            return film.at([late + k / self.rate for k in range(count)])
        first = int(start * (film.frames - (count - 1) * self.stride))
        return film.take(range(first, first + count * self.stride, self.stride))

    def _cut(self, frames: Sequence[Any], start: float) -> Sequence[Any]:
        """As many of the frames as a clip holds."""
        if not len(frames) or getattr(frames, "ndim", 4) != 4:
            found = getattr(frames, "shape", "no frame")
            raise ValueError(f"found a video of {found}; expected uint8 (T, H, W, 3) or a list of pictures")
        first = int(start * (max(0, len(frames) - self.frames) + 1))
        return frames[first : first + self.frames]

    def _count(self, frames: float, seconds: float) -> int:
        """How many frames are taken of a film."""
        found = frames / self.stride if self.rate is None else (seconds - TICK) * self.rate
        return max(1, min(self.frames, math.ceil(found)))

    def length(self, facts: dict[str, float]) -> int | None:
        """From "frames", with a rate from "seconds" or "frames" and "fps"."""
        seconds = facts.get("seconds", facts["frames"] / facts["fps"] if {"frames", "fps"} <= facts.keys() else None)
        if (facts.get("frames") if self.rate is None else seconds) is None:
            return None
        count = self._count(facts.get("frames", 0), seconds or 0)
        return math.ceil(count / self.tubelet) * (self.size // self.patch) ** 2

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32) / 127.5 - 1)

    def restore(self, t: Tokens) -> np.ndarray:
        side = self.size // self.patch
        x = ((t.x[0][t.real()[0]].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        shape = {"h": side, "w": side, "s": self.tubelet, "p": self.patch, "q": self.patch}
        return rearrange(x, "(t h w) (s p q c) -> (t s) (h p) (w q) c", **shape).cpu().numpy()

    def blank(self) -> Tokens:
        return self.canvas(*tubes(math.ceil(self.frames / self.tubelet), self.size // self.patch, self.tubelet))

    def example(self, n: int, seed: int) -> list[Tokens]:
        noise = (random.uniform(torch.tensor(seed), (n, 3, 4, 4, 3), "video") * 255).to(torch.uint8)
        return [self.tokens(clip[: 2 + k % 2].numpy()) for k, clip in enumerate(noise)]


class Video(Encoder):
    """A transformer over tubelets.

    Args:
        trunk: the transformer.
        size: pixels of a frame's longer side.
        patch: pixels per tubelet side.
        frames: the most frames of a clip.
        stride: every how many frames one is taken.
        tubelet: frames per tubelet.
        rate: frames per second to take, in place of stride.
        attention: "joint" = every token sees all moments and places. "factorised" = the trunk's blocks look in turns over the
            places of their moment and the moments of their place, see headwater.modalities.factorised.
        pooling: see Encoder.
    """

    reader: VideoReader

    def __init__(
        self,
        trunk: Trunk,
        size: int = 64,
        patch: int = 8,
        frames: int = 16,
        stride: int = 1,
        tubelet: int = 1,
        rate: float | None = None,
        attention: Literal["joint", "factorised"] = "joint",
        pooling: Pooling = "mean",
    ) -> None:
        if attention == "factorised" and (len(trunk.blocks) < 2 or trunk.registers is not None):
            registers = 0 if trunk.registers is None else len(trunk.registers)
            raise ValueError(
                f"found a trunk of depth {len(trunk.blocks)} with {registers} registers; factorised attention needs two blocks or "
                "more, for space and for time, and no registers: these have neither a moment nor a place"
            )
        super().__init__(VideoReader(size, patch, frames, stride, tubelet, rate), trunk, pooling)
        self.attention, self.cacheable = attention, attention == "joint"

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        if self.attention == "joint":
            return super().forward(t, causal, condition)
        return factorised(self.trunk, t, self.reader.size // self.reader.patch, causal or self.causal, condition)


@lru_cache(maxsize=1024)
def tubes(steps: int, side: int, tubelet: int) -> tuple[Tensor, Tensor]:
    """Position (N, 3) int32 and order (N,) int64 of steps * side * side tubelets. Shared: never write into them."""
    position = grid(steps, side, side).clone()
    position[:, 0] = position[:, 0] * tubelet + tubelet - 1
    return position, position[:, 0].long()
