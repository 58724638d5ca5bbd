"""Pictures as square patches with (time, row, column) coordinates."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.modalities import decoding
from headwater.modalities.jpegs import Jpeg
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk

Shape = Literal["pad", "crop", "native"]
JPEG = b"\xff\xd8\xff"  # how every JPEG begins, whatever its name


class ImageReader(Reader):
    """A picture of any size and mode -> RGB of the shape that is asked for -> patches of patch * patch * 3 bytes.

    Transparency becomes white. A random view is a crop of 60 to 100 % of the area. It has as many patches as the whole.

    Args:
        size: pixels per side of what the encoder sees.
        patch: pixels per patch side.
        shape: "pad" scales the longer side to `size` and fills up with white, so that nothing is cut off; "crop" scales the
            shorter side and keeps the centre (what most published image towers were trained with). "native" keeps the shape:
            the picture is scaled down until it has at most (size / patch)^2 patches, and a smaller one is left as it is but
            for rounding both sides to whole patches, at least one.
        zoom: with "crop", the shorter side is scaled to size / zoom.
        mean, std: per channel, of pixels from 0 to 1; what `prepare` takes away and divides by.
    """

    extensions = ("png", "jpg", "jpeg", "webp", "gif", "bmp")

    def __init__(
        self,
        size: int = 64,
        patch: int = 8,
        shape: Shape = "pad",
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
        content = members[str(self.member(members))]
        if content.startswith(JPEG):
            opens = decoding.backend("jpeg")
            try:
                return self._jpeg(opens(content))
            except Exception:  # a strict decoder; Pillow has the last word, it forgives stray bytes but no missing ones
                pass
        return rgb(io.BytesIO(content))

    def _jpeg(self, opened: Jpeg) -> np.ndarray:
        """A JPEG decoded no larger than needed, where that does not change its grid."""
        decoding.within(opened.height, opened.width)
        if self.shape != "native":
            least = self.size if self.shape == "pad" else math.floor(self.size / self.zoom)
            return opened.pixels(least, least)
        rows, columns = self._sides(opened.height, opened.width)
        picture = opened.pixels(rows * self.patch, columns * self.patch)
        same = self._sides(*picture.shape[:2]) == (rows, columns)
        return picture if same else opened.pixels(opened.height, opened.width)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of this size."""
        side = self.size // self.patch
        return native(height, width, self.patch, side * side) if self.shape == "native" else (side, side)

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        picture = rgb(signal)
        rows, columns = self._sides(*picture.shape[:2])
        if view is not None:
            picture = crop(picture, view)
        if self.shape == "crop":
            picture = centre(picture, self.size, self.zoom)
        elif self.shape == "pad":
            picture = fit(picture, self.size)
        else:
            picture = resize(picture, rows * self.patch, columns * self.patch)
        return Tokens(patches(picture[None], 1, self.patch), grid(1, rows, columns))

    def length(self, facts: dict[str, float]) -> int | None:
        if self.shape == "native" and not {"width", "height"} <= facts.keys():
            return None
        return math.prod(self._sides(int(facts.get("height", 1)), int(facts.get("width", 1))))

    def prepare(self, t: Tokens) -> Tokens:
        mean, std = (t.x.new_tensor(c, dtype=torch.float32).repeat(self.patch**2) for c in (self.mean, self.std))
        return t._replace(x=(t.x.to(torch.float32) / 255 - mean) / std)

    def restore(self, t: Tokens) -> np.ndarray:
        real = t.real()[0]
        rows = int(t.position[0][real][:, 1].max()) + 1
        x = rearrange(t.x[0][real], "(h w) (p q c) -> (h p) (w q) c", h=rows, p=self.patch, q=self.patch)
        x = x * x.new_tensor(self.std) + x.new_tensor(self.mean)
        return (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        noise = random.uniform(torch.tensor(seed), (n, 3, 3, 3), "image") * 255
        return [self.tokens(s.numpy().astype(np.uint8)) for s in noise]


class Image(Encoder):
    """A vision transformer over the patches of ImageReader.

    Args:
        trunk: the transformer.
        size: pixels of the longer side, to which every picture is scaled; with another shape see ImageReader.
        patch: pixels per patch side.
        shape: "pad", "crop" or "native".
    """

    def __init__(self, trunk: Trunk, size: int = 64, patch: int = 8, shape: Shape = "pad") -> None:
        super().__init__(ImageReader(size, patch, shape), trunk)


def rgb(source: Any) -> np.ndarray:
    """A path, file, PIL picture or array (H, W) or (H, W, 3 or 4) -> uint8 (H, W, 3); transparency over white.

    ValueError for other arrays, and for files that declare more than decoding.LIMIT pixels.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3 and source.size:
        return source
    from PIL import Image as Pictures

    if isinstance(source, np.ndarray | Tensor):
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
            raise ValueError(f"found a picture of {array.dtype} {array.shape}; expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
        source = Pictures.fromarray(array)
    picture = source if isinstance(source, Pictures.Image) else opened(source)
    if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits instead of scaling them
        picture = Pictures.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Pictures.alpha_composite(Pictures.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def opened(source: Any) -> Any:
    """A path or file as a PIL picture whose pixels are not decoded yet; ValueError when it declares too many."""
    from PIL import Image as Pictures

    try:
        picture = Pictures.open(source)
    except Pictures.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    decoding.within(picture.height, picture.width)
    return picture


@lru_cache(maxsize=4096)
def native(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of whole patches for a picture of height x width pixels: at most `most`, of its shape, never enlarged.

    Both are what the largest fitting scale up to 1 rounds to, so the shape is kept to half a patch per side. A side below one
    patch becomes one, and the other one at most `most`. After NaFlex (Tschannen et al. 2025, arXiv:2502.14786).
    """
    tall, wide = height / patch, width / patch
    scale = min(1.0, math.sqrt(most / (tall * wide)))
    rows, columns = (min(most, max(1, round(n * scale))) for n in (tall, wide))
    while rows * columns > most:  # shrink until the next side rounds to one less
        if columns == 1 or (rows > 1 and (rows - 0.5) / tall >= (columns - 0.5) / wide):
            rows -= 1
        else:
            columns -= 1
    return rows, columns


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3), bilinear with antialiasing; the picture itself when it has that size."""
    if picture.shape[:2] == (height, width):
        return picture
    frame = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)
    scaled = F.interpolate(frame[None], (height, width), mode="bilinear", antialias=True)[0]
    return scaled.permute(1, 2, 0).numpy()


def fit(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3): scaled so that the longer side is `size`, centred on white."""
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    picture = resize(picture, tall, wide)
    if tall == wide:
        return picture
    canvas = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - tall) // 2, (size - wide) // 2
    canvas[top : top + tall, left : left + wide] = picture
    return canvas


def centre(picture: np.ndarray, size: int, zoom: float) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3): the shorter side bicubically scaled to size / zoom, then the centre."""
    from PIL import Image as Pictures

    height, width = picture.shape[:2]
    shorter = math.floor(size / zoom)
    wide, tall = (int(shorter * n / min(height, width)) for n in (width, height))  # in this order exact for the shorter side
    if (tall, wide) != (height, width):
        picture = np.asarray(Pictures.fromarray(picture).resize((wide, tall), Pictures.Resampling.BICUBIC))
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    return picture[top : top + size, left : left + size]


def crop(picture: np.ndarray, seed: Tensor, smallest: float = 0.6) -> np.ndarray:
    """A random part of (H, W, 3) that keeps its shape and `smallest` to 1 of its area."""
    area, down, right = random.uniform(seed, (3,), "crop").tolist()
    side = (smallest + (1 - smallest) * area) ** 0.5
    height, width = (max(1, round(side * n)) for n in picture.shape[:2])
    top, left = round(down * (picture.shape[0] - height)), round(right * (picture.shape[1] - width))
    return picture[top : top + height, left : left + width]


def patches(frames: np.ndarray, time: int, patch: int) -> Tensor:
    """(T, H, W, C) -> (T/time * H/patch * W/patch, time * patch * patch * C) in time, row, column order; always a copy."""
    steps, height, width, channels = frames.shape
    rows, columns = height // patch, width // patch
    cut = frames.reshape(steps // time, time, rows, patch, columns, patch, channels).transpose(0, 2, 4, 1, 3, 5, 6)
    return torch.from_numpy(cut.copy().reshape(-1, time * patch * patch * channels))


@lru_cache(maxsize=4096)
def grid(*sizes: int) -> Tensor:
    """Coordinates of a full grid, (prod(sizes), len(sizes)) int32. Made once and shared: never write into it."""
    return torch.cartesian_prod(*[torch.arange(n, dtype=torch.int32) for n in sizes]).reshape(-1, len(sizes))
