"""Moving pictures as tubelets with (frame, row, column) coordinates."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from headwater import random
from headwater.modalities.image import fit, grid, patches, rgb
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class VideoReader(Reader):
    """A video file -> at most `frames` frames, every `stride`-th, size x size -> tubelets of tubelet x patch x patch pixels.

    Position: (number of the tubelet's last frame, row, column). Order is that number too: the patches of one moment see each
    other, and in causal attention a step sees the frames up to its own.
    """

    extensions = ("mp4", "webm", "mkv", "avi", "mov")

    def __init__(self, size: int = 64, patch: int = 8, frames: int = 16, stride: int = 1, tubelet: int = 1) -> None:
        if size % patch:
            raise ValueError(
                f"frame size {size} is not a multiple of patch {patch}; choose for example size {size // patch * patch}"
            )
        self.size, self.patch, self.frames, self.stride, self.tubelet = size, patch, frames, stride, tubelet
        self.features = tubelet * patch * patch * 3

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        import av

        frames: list[np.ndarray] = []
        with av.open(io.BytesIO(members[str(self.member(members))])) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % self.stride == 0:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == self.frames:
                    break
        if not frames:
            raise ValueError("the video has no frame")
        return np.stack(frames)

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        """signal: uint8 (T, H, W, 3) or a list of pictures; the last frame is repeated to fill a tubelet."""
        frames = torch.stack([fit(rgb(f), self.size) for f in signal[: self.frames]])
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % self.tubelet, -1, -1, -1)])
        side = self.size // self.patch
        position = grid(len(frames) // self.tubelet, side, side)
        position[:, 0] = position[:, 0] * self.tubelet + self.tubelet - 1
        return Tokens(patches(frames, self.tubelet, self.patch), position, order=position[:, 0].long())

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32) / 127.5 - 1)

    def restore(self, t: Tokens) -> np.ndarray:
        side = self.size // self.patch
        x = ((t.x[0][t.real()[0]].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        shape = {"h": side, "w": side, "s": self.tubelet, "p": self.patch, "q": self.patch}
        return rearrange(x, "(t h w) (s p q c) -> (t s) (h p) (w q) c", **shape).cpu().numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        noise = (random.uniform(torch.tensor(seed), (n, 3, 4, 4, 3), "video") * 255).to(torch.uint8)
        return [self.tokens(clip[: 2 + k % 2].numpy()) for k, clip in enumerate(noise)]


class Video(Encoder):
    """A transformer over tubelets, attending jointly over space and time.

    Args:
        trunk: the transformer.
        size: pixels of a frame's longer side.
        patch: pixels per tubelet side.
        frames: the most frames of a clip.
        stride: every how many frames one is taken.
        tubelet: frames per tubelet.
    """

    def __init__(self, trunk: Trunk, size: int = 64, patch: int = 8, frames: int = 16, stride: int = 1, tubelet: int = 1) -> None:
        super().__init__(VideoReader(size, patch, frames, stride, tubelet), trunk)
