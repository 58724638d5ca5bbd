"""Pictures as square patches with (time, row, column) coordinates."""

from __future__ import annotations

import io
from typing import Any

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

    The longer side is scaled to `size` and the rest is filled with white, so that nothing is cut off; transparency becomes
    white. A random view is a crop of 60 to 100 % of the area.
    """

    extensions = ("png", "jpg", "jpeg", "webp", "gif", "bmp")

    def __init__(self, size: int = 64, patch: int = 8, mean: float = 0.5, std: float = 0.5) -> None:
        if size % patch:
            raise ValueError(f"picture size {size} is not a multiple of patch {patch}; choose for example size {size // patch * patch}")
        self.size, self.patch, self.mean, self.std = size, patch, mean, std
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
        picture = torch.from_numpy(np.array(rgb(signal))).permute(2, 0, 1)
        if view is not None:
            picture = crop(picture, view)
        x = patches(fit(picture, self.size)[None], 1, self.patch)
        return Tokens(x, grid(1, self.size // self.patch, self.size // self.patch))

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=(t.x.to(torch.float32) / 255 - self.mean) / self.std)

    def restore(self, t: Tokens) -> np.ndarray:
        side = self.size // self.patch
        x = (t.x[0] * self.std + self.mean).clamp(0, 1) * 255
        x = rearrange(x, "(h w) (p q c) -> (h p) (w q) c", h=side, w=side, p=self.patch, q=self.patch)
        return x.round().to(torch.uint8).cpu().numpy()

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
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Pictures.alpha_composite(Pictures.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def fit(picture: Tensor, size: int) -> Tensor:
    """uint8 (C, H, W) -> (C, size, size): scaled so that the longer side is `size`, centred on white."""
    height, width = picture.shape[-2:]
    scale = size / max(height, width)
    target = (max(1, round(height * scale)), max(1, round(width * scale)))
    if target != (height, width):
        picture = F.interpolate(picture[None].float(), target, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return F.pad(picture, (left, size - target[1] - left, top, size - target[0] - top), value=255)


def crop(picture: Tensor, seed: Tensor, smallest: float = 0.6) -> Tensor:
    """A random part of (C, H, W) that keeps its shape and `smallest` to 1 of its area."""
    area, down, right = random.uniform(seed, (3,), "crop").tolist()
    side = (smallest + (1 - smallest) * area) ** 0.5
    height, width = (max(1, round(side * n)) for n in picture.shape[-2:])
    top, left = round(down * (picture.shape[-2] - height)), round(right * (picture.shape[-1] - width))
    return picture[:, top : top + height, left : left + width]


def patches(frames: Tensor, time: int, patch: int) -> Tensor:
    """(T, C, H, W) -> (T/time * H/patch * W/patch, time * patch * patch * C), in time, row, column order."""
    return rearrange(frames, "(t s) c (h p) (w q) -> (t h w) (s p q c)", s=time, p=patch, q=patch)


def grid(*sizes: int) -> Tensor:
    """Coordinates of a full grid, (prod(sizes), len(sizes)) int32."""
    return torch.cartesian_prod(*[torch.arange(n, dtype=torch.int32) for n in sizes]).reshape(-1, len(sizes))
