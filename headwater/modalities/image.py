"""Pictures as square patches with (time, row, column) coordinates."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from headwater import random
from headwater.modalities import decoding
from headwater.modalities.jpegs import Jpeg
from headwater.modalities.resampled import Resampled
from headwater.modalities.scaling import Interpolation, Shape, centre, crop, fit, native, pillow, recolour, resize, scaled
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

JPEG = b"\xff\xd8\xff"  # how every JPEG begins, whatever its name


class ImageReader(Reader):
    """A picture of any size and mode -> RGB of the shape that is asked for -> patches of patch * patch * 3 bytes.

    Transparency becomes white. A random view is a crop, of 60 to 100 % of the area unless it names a share; its strength
    changes colours, sharpness and direction. At scale 1 it has as many patches as the whole.

    Args:
        size: pixels per side of what the encoder sees.
        patch: pixels per patch side.
        shape: "pad" scales the longer side to `size` and fills up with white, so that nothing is cut off. "crop", "squash" and
            "border" are timm's crop modes, what published image towers were trained with: scale the shorter side, both sides,
            or the longer side, then take the centre; "border" fills up with the mean colour. "native" keeps the shape: the
            picture is scaled down until it has at most (size / patch)^2 patches, and a smaller one is left as it is but for
            rounding both sides to whole patches, at least one (NaFlex, Tschannen et al. 2025, arXiv:2502.14786).
        zoom: timm's crop_pct: with its three modes, what is scaled becomes size / zoom long.
        mean, std: per channel, of pixels from 0 to 1; what `prepare` takes away and divides by.
        interpolation: None = bicubic with timm's modes, as for most of its towers, and bilinear else.
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
        interpolation: Interpolation | None = None,
    ) -> None:
        if size % patch:
            raise ValueError(
                f"picture size {size} is not a multiple of patch {patch}; choose for example size {size // patch * patch}"
            )
        if not 0 < zoom <= 1:
            raise ValueError(f"found zoom {zoom}; expected above 0 and at most 1, the share of the scaled picture that is kept")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"found mean {tuple(mean)} and std {tuple(std)}; expected three numbers each, for pixels from 0 to 1")
        self.size, self.patch, self.shape, self.zoom = size, patch, shape, zoom
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = interpolation or ("bilinear" if shape in ("pad", "native") else "bicubic")
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
        """A JPEG decoded no larger than needed, where that does not change its grid; whole where every pixel shall be timm's."""
        decoding.within(opened.height, opened.width)
        if self.shape == "pad":
            return opened.pixels(self.size, self.size)
        if self.shape == "native":
            rows, columns = self._sides(opened.height, opened.width)
            picture = opened.pixels(rows * self.patch, columns * self.patch)
            if self._sides(*picture.shape[:2]) == (rows, columns):
                return picture
        return opened.pixels(opened.height, opened.width)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of this size."""
        side = self.size // self.patch
        return native(height, width, self.patch, side * side) if self.shape == "native" else (side, side)

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        picture, size = rgb(signal), self.size
        rows, columns = self._sides(*picture.shape[:2])
        if view is not None:
            picture = recolour(crop(picture, view), view)
            rows, columns = (max(1, round(view.scale * n)) for n in (rows, columns))
            size = max(1, round(view.scale * self.size / self.patch)) * self.patch
        if self.shape == "native":
            picture = resize(picture, rows * self.patch, columns * self.patch, self.interpolation)
        elif self.shape == "pad":
            picture = fit(picture, size, self.interpolation)
        else:
            height, width = picture.shape[:2]
            tall, wide = scaled(height, width, math.floor(size / self.zoom), self.shape)
            fill = [round(255 * channel) for channel in self.mean]
            picture = centre(pillow(picture, tall, wide, self.interpolation), size, fill)
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

    def blank(self) -> Tokens:
        return self.canvas(grid(1, self.size // self.patch, self.size // self.patch))

    def example(self, n: int, seed: int) -> list[Tokens]:
        noise = (random.uniform(torch.tensor(seed), (n, 3, 3, 3), "image") * 255).numpy().astype(np.uint8)
        if self.shape != "native":
            return [self.tokens(picture) for picture in noise]
        parts = [picture[: 2 + k % 2, : 1 + k % 3] for k, picture in enumerate(noise)]  # of several shapes
        return [self.tokens(part.repeat(self.patch, 0).repeat(self.patch, 1)) for part in parts]


class Image(Encoder):
    """A vision transformer over the patches of ImageReader.

    Args:
        trunk: the transformer.
        size: pixels of the longer side, to which every picture is scaled; with another shape see ImageReader.
        patch: pixels per patch side.
        shape: "pad", "crop", "squash", "border" or "native".
        zoom, mean, std, interpolation: see ImageReader; a converted tower keeps its own.
        pooling: see Encoder.
        table: side of a learned table of positions, resampled to the grid of every picture and added to its patches (see
            headwater.modalities.resampled); None = the trunk's positions alone. Mask vectors that are put in place of patches
            do not have it, so leave the trunk its own positions for them.
    """

    def __init__(
        self,
        trunk: Trunk,
        size: int = 64,
        patch: int = 8,
        shape: Shape = "pad",
        zoom: float = 1.0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        interpolation: Interpolation | None = None,
        pooling: Pooling = "mean",
        table: int | None = None,
    ) -> None:
        super().__init__(ImageReader(size, patch, shape, zoom, mean, std, interpolation), trunk, pooling)
        self.place = None if table is None else Resampled(table, trunk.width)
        self.pointwise = self.cacheable = self.place is None  # the table is laid over the grid of the whole picture

    def embed(self, raw: Tokens) -> Tokens:
        t = super().embed(raw)
        return t if self.place is None else t._replace(x=t.x + self.place(raw).to(t.x.dtype))


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
