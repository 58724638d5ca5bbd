"""Pictures as square patches with (time, row, column) coordinates."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class ImageReader(Reader):
    """A picture of any size and mode -> size x size RGB -> (size / patch)^2 patches of patch * patch * 3 bytes.

    Transparency becomes white. A random view is a crop of 60 to 100 % of the area.

    Args:
        size: pixels per side of what the encoder sees.
        patch: pixels per patch side.
        shape: "pad" scales the longer side to `size` and fills up with white, so that nothing is cut off; "crop" scales the
            shorter side and keeps the centre (what most published image towers were trained with).
        zoom: with "crop", the shorter side is scaled to size / zoom.
        mean, std: per channel, of pixels from 0 to 1; what `prepare` takes away and divides by.
    """

    extensions = ("png", "jpg", "jpeg", "webp", "gif", "bmp")

    def __init__(
        self,
        size: int = 64,
        patch: int = 8,
        shape: Literal["pad", "crop"] = "pad",
        zoom: float = 1.0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        if size % patch:
            raise ValueError(
                f"picture size {size} is not a multiple of patch {patch}; choose for example size {size // patch * patch}"
            )
        self.size, self.patch, self.shape, self.zoom = size, patch, shape, zoom
        self.mean, self.std = tuple(mean), tuple(std)
        self.features = patch * patch * 3

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        name = self.member(members)
        content = members[str(name)]
        if name in ("jpg", "jpeg"):
            import simplejpeg

            if simplejpeg.is_jpeg(content):
                return simplejpeg.decode_jpeg(content, "RGB", min_height=self.size, min_width=self.size)
        return rgb(io.BytesIO(content))

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        picture = rgb(signal)
        if view is not None:
            picture = crop(picture, view)
        side = self.size // self.patch
        fitted = fit(picture, self.size) if self.shape == "pad" else centre(picture, self.size, self.zoom)
        return Tokens(patches(fitted[None], 1, self.patch), grid(1, side, side))

    def prepare(self, t: Tokens) -> Tokens:
        mean, std = (t.x.new_tensor(c, dtype=torch.float32).repeat(self.patch**2) for c in (self.mean, self.std))
        return t._replace(x=(t.x.to(torch.float32) / 255 - mean) / std)

    def restore(self, t: Tokens) -> np.ndarray:
        side = self.size // self.patch
        x = rearrange(t.x[0], "(h w) (p q c) -> (h p) (w q) c", h=side, w=side, p=self.patch, q=self.patch)
        x = x * x.new_tensor(self.std) + x.new_tensor(self.mean)
        return (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        noise = random.uniform(torch.tensor(seed), (n, 3, 3, 3), "image") * 255
        return [self.tokens(s.numpy().astype(np.uint8)) for s in noise]


class Image(Encoder):
    """A vision transformer over the patches of ImageReader.

    Args:
        trunk: the transformer.
        size: pixels of the longer side, to which every picture is scaled.
        patch: pixels per patch side.
    """

    def __init__(self, trunk: Trunk, size: int = 64, patch: int = 8) -> None:
        super().__init__(ImageReader(size, patch), trunk)


def rgb(source: Any) -> np.ndarray:
    """A path, file, PIL picture or array (H, W) or (H, W, 3 or 4) -> uint8 (H, W, 3); transparency over white."""
    from PIL import Image as Pictures

    if isinstance(source, np.ndarray | Tensor):
        array = np.asarray(source)
        if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
            return array
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ValueError(f"found a picture of {array.dtype} {array.shape}; expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
        source = Pictures.fromarray(array)
    picture = source if isinstance(source, Pictures.Image) else Pictures.open(source)
    if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits instead of scaling them
        picture = Pictures.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Pictures.alpha_composite(Pictures.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def fit(picture: np.ndarray, size: int) -> Tensor:
    """uint8 (H, W, 3) -> (3, size, size): scaled so that the longer side is `size`, centred on white."""
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    height, width = frame.shape[-2:]
    scale = size / max(height, width)
    target = (max(1, round(height * scale)), max(1, round(width * scale)))
    if target != (height, width):
        frame = F.interpolate(frame[None].float(), target, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return F.pad(frame, (left, size - target[1] - left, top, size - target[0] - top), value=255)


def centre(picture: np.ndarray, size: int, zoom: float) -> Tensor:
    """uint8 (H, W, 3) -> (3, size, size): the shorter side bicubically scaled to size / zoom, then the centre."""
    from PIL import Image as Pictures

    height, width = picture.shape[:2]
    shorter = math.floor(size / zoom)
    wide, tall = (int(shorter * n / min(height, width)) for n in (width, height))  # in this order exact for the shorter side
    scaled = Pictures.fromarray(picture).resize((wide, tall), Pictures.Resampling.BICUBIC)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    return torch.from_numpy(np.array(scaled.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


def crop(picture: np.ndarray, seed: Tensor, smallest: float = 0.6) -> np.ndarray:
    """A random part of (H, W, 3) that keeps its shape and `smallest` to 1 of its area."""
    area, down, right = random.uniform(seed, (3,), "crop").tolist()
    side = (smallest + (1 - smallest) * area) ** 0.5
    height, width = (max(1, round(side * n)) for n in picture.shape[:2])
    top, left = round(down * (picture.shape[0] - height)), round(right * (picture.shape[1] - width))
    return picture[top : top + height, left : left + width]


def patches(frames: Tensor, time: int, patch: int) -> Tensor:
    """(T, C, H, W) -> (T/time * H/patch * W/patch, time * patch * patch * C), in time, row, column order."""
    return rearrange(frames, "(t s) c (h p) (w q) -> (t h w) (s p q c)", s=time, p=patch, q=patch)


def grid(*sizes: int) -> Tensor:
    """Coordinates of a full grid, (prod(sizes), len(sizes)) int32."""
    return torch.cartesian_prod(*[torch.arange(n, dtype=torch.int32) for n in sizes]).reshape(-1, len(sizes))
