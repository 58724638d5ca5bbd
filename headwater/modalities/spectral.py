"""Pictures of any number of bands and any bit depth, as patches per group of bands.

Groups with a patch embedding of their own and (row, column, group) coordinates as in SatMAE (Cong et al. 2022,
arXiv:2207.08051; https://github.com/sustainlab-group/SatMAE).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional as F

from headwater import random
from headwater.modalities import decoding
from headwater.modalities.action import array
from headwater.modalities.image import grid, opened, patches
from headwater.modalities.scaling import crop
from headwater.modalities.series import Slots
from headwater.model import Encoder, Reader
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View


class SpectralReader(Reader):
    """A picture (H, W, C) or (C, H, W) of numbers -> for each group of bands its patches, at (0, row, column, group).

    Which axis holds the bands is told by their number; where both could, it is the last. The longer side is scaled to `size`.
    NaN or `nodata` is an absent value: a clouded pixel, a band that this sensor lacks (keep its place), the margin beside a picture
    that is not square, and the end of the vector where a group has fewer bands than the largest. A patch without any value is
    no token. A random view is a crop of 60 to 100 % of the area.

    Args:
        mean, std: of each band, in the numbers of the file.
        groups: the bands of each group, by number; bands in none are not read. None = all in one.
        size: pixels per side of what the encoder sees.
        patch: pixels per patch side.
        nodata: a number that stands for an absent value.
    """

    extensions = ("bands.npy", "tif", "tiff", "npy")

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        groups: Sequence[Sequence[int]] | None = None,
        size: int = 64,
        patch: int = 8,
        nodata: float | None = None,
    ) -> None:
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self.groups = [list(group) for group in groups] if groups else [list(range(len(mean)))]
        named = [band for group in self.groups for band in group]
        if len(mean) != len(std) or not len(mean) or min(std) <= 0:
            raise ValueError(
                f"found {len(mean)} means and deviations {list(std)}; expected one of both per band, the latter above 0"
            )
        if not all(self.groups) or len(set(named)) < len(named) or not set(named) <= set(range(len(mean))):
            raise ValueError(f"found the groups {self.groups} of {len(mean)} bands; expected numbers below that, each in one group")
        if size % patch:
            raise ValueError(f"picture size {size} is not a multiple of patch {patch}; choose for example {size // patch * patch}")
        self.size, self.patch, self.nodata = size, patch, nodata
        self.features = patch * patch * max(map(len, self.groups))

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        member = str(self.member(members))
        return pages(members[member]) if member in ("tif", "tiff") else array(members[member])

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        picture = self._bands(np.asarray(signal))
        picture = whole(picture if view is None else crop(picture, view), self.size)
        place, x, position = grid(1, self.size // self.patch, self.size // self.patch), [], []
        for number, group in enumerate(self.groups):
            cut = patches(picture[None][..., group], 1, self.patch)
            x.append(F.pad(cut, (0, self.features - cut.shape[1]), value=math.nan))
            position.append(F.pad(place, (0, 1), value=number))
        every = torch.cat(x)
        found = ~every.isnan().all(1)
        if not found.any():
            raise ValueError("no band of the picture has a value")
        return Tokens(every[found], torch.cat(position)[found])

    def _bands(self, picture: np.ndarray) -> np.ndarray:
        """Whatever came in as normalised float32 (H, W, C)."""
        bands, found = len(self.mean), f"found a picture of {picture.dtype} {picture.shape}"
        picture = picture[..., None] if picture.ndim == 2 and bands == 1 else picture
        if picture.dtype.kind not in "fiu" or picture.ndim != 3 or not picture.size or bands not in picture.shape[::2]:
            raise ValueError(f"{found}; expected numbers (H, W, {bands}) or ({bands}, H, W)")
        picture = (picture if picture.shape[2] == bands else picture.transpose(1, 2, 0)).astype(np.float32)
        if np.isinf(picture).any():
            raise ValueError("the picture holds infinite values; mark what is absent as NaN, or name it with `nodata`")
        if self.nodata is not None:
            picture = np.where(picture == np.float32(self.nodata), np.nan, picture)
        return (picture - self.mean) / self.std

    def length(self, facts: dict[str, float]) -> int | None:
        """All patches of all groups; too large by those without a value."""
        return (self.size // self.patch) ** 2 * len(self.groups)

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32))

    def restore(self, t: Tokens) -> np.ndarray:
        """float32 (size, size, C) in the numbers of the file, NaN where there is no token."""
        real, side = t.real()[0], self.size // self.patch
        place = t.position[0][real].long().cpu()
        cut = torch.full((len(self.groups), side, side, self.features), math.nan)
        cut[place[:, 3], place[:, 1], place[:, 2]] = t.x[0][real].float().cpu()
        picture = np.full((self.size, self.size, len(self.mean)), np.nan, np.float32)
        for group, x in zip(self.groups, cut, strict=True):
            x = x[..., : self.patch**2 * len(group)]
            picture[..., group] = rearrange(x, "h w (p q c) -> (h p) (w q) c", p=self.patch, q=self.patch).numpy()
        return picture * self.std + self.mean

    def example(self, n: int, seed: int) -> list[Tokens]:
        noise = random.normal(torch.tensor(seed), (n, self.size, self.size, len(self.mean)), "spectral").numpy()
        made = []
        for k, picture in enumerate(noise * self.std + self.mean):
            picture[: self.patch * (k % 2), :, 0] = np.nan  # of every other one the first band begins late
            made.append(self.tokens(picture))
        return made


class Spectral(Encoder):
    """A vision transformer over the patches of each group of bands.

    Args:
        trunk: the transformer.
        mean, std: of each band, in the numbers of the file.
        groups: the bands of each group, by number; None = all in one.
        size: pixels per side of what the encoder sees.
        patch: pixels per patch side.
        nodata: a number that stands for an absent value.
        pooling: how tokens become one vector; see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        mean: Sequence[float],
        std: Sequence[float],
        groups: Sequence[Sequence[int]] | None = None,
        size: int = 64,
        patch: int = 8,
        nodata: float | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        reader = SpectralReader(mean, std, groups, size, patch, nodata)
        super().__init__(reader, trunk, pooling)
        self.stem = Slots(self.features, len(reader.groups) * trunk.width)

    def embed(self, raw: Tokens) -> Tokens:
        every = self.stem(raw.x).unflatten(-1, (-1, self.width))  # (B, N, groups, D)
        own = raw.position[..., 3].long()[..., None, None]
        return raw._replace(x=every.take_along_dim(own, -2)[..., 0, :])


def whole(picture: np.ndarray, size: int) -> np.ndarray:
    """float32 (H, W, C) -> (size, size, C): scaled so that the longer side is `size`, at the top left of NaN."""
    height, width, bands = picture.shape
    scale = size / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    if (tall, wide) != (height, width):
        frame = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
        picture = F.interpolate(frame, (tall, wide), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    canvas = np.full((size, size, bands), np.nan, np.float32)
    canvas[:tall, :wide] = picture
    return canvas


def pages(content: bytes) -> np.ndarray:
    """A TIFF that Pillow reads, (H, W, C): the bands of its pages one after the other."""
    from PIL import ImageSequence, UnidentifiedImageError

    try:
        picture = opened(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError(
            "Pillow cannot read this TIFF: it knows 1 to 4 bands of 8 bits, or one of 16 or 32 per page; save the array as .npy"
        ) from error
    decoding.within(picture.height, picture.width * getattr(picture, "n_frames", 1))
    found = [np.asarray(page) for page in ImageSequence.Iterator(picture)]
    sizes = {page.shape[:2] for page in found}
    if len(sizes) > 1:
        raise ValueError(f"the pages of the TIFF have the sizes {sorted(sizes)}; expected bands of one size")
    return np.concatenate([page.reshape(*page.shape[:2], -1) for page in found], -1)
