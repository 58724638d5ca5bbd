"""A picture brought to the shape that is asked for. Every function takes and gives uint8 (H, W, 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from headwater.view import View

Shape = Literal["pad", "crop", "squash", "border", "native"]
Interpolation = Literal["bilinear", "bicubic"]


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


def resize(picture: np.ndarray, height: int, width: int, interpolation: Interpolation = "bilinear") -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3), with antialiasing; the picture itself when it has that size."""
    if picture.shape[:2] == (height, width):
        return picture
    frame = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)
    smooth = F.interpolate(frame[None], (height, width), mode=interpolation, antialias=True)[0]
    return smooth.permute(1, 2, 0).numpy()


def fit(picture: np.ndarray, size: int, interpolation: Interpolation = "bilinear") -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3): scaled so that the longer side is `size`, centred on white."""
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    picture = resize(picture, tall, wide, interpolation)
    if tall == wide:
        return picture
    canvas = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - tall) // 2, (size - wide) // 2
    canvas[top : top + tall, left : left + wide] = picture
    return canvas


def scaled(height: int, width: int, target: int, shape: Shape) -> tuple[int, int]:
    """Height and width before the centre is taken: the shorter ("crop"), the longer ("border") or both sides become `target`."""
    if shape == "squash":
        return target, target
    if shape == "border":
        ratio = max(height, width) / target
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    shorter = min(height, width)
    return int(target * height / shorter), int(target * width / shorter)  # in this order exact for the shorter side


def pillow(picture: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3) by Pillow, to the pixel what towers of timm saw."""
    from PIL import Image as Pictures

    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Pictures.fromarray(picture).resize((width, height), Pictures.Resampling[interpolation.upper()]))


def centre(picture: np.ndarray, size: int, fill: Sequence[int]) -> np.ndarray:
    """uint8 (H, W, 3) -> its centre (size, size, 3); what is missing on a side has the colour `fill`."""
    height, width = picture.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    if min(top, left) >= 0:
        return picture[top : top + size, left : left + size]
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = fill
    part = picture[max(0, top) : max(0, top) + size, max(0, left) : max(0, left) + size]
    down, right = (size - part.shape[0]) // 2, (size - part.shape[1]) // 2
    canvas[down : down + part.shape[0], right : right + part.shape[1]] = part
    return canvas


def window(height: int, width: int, view: View, default: tuple[float, float] = (0.6, 1.0)) -> tuple[int, int, int, int]:
    """Top, left, height and width of the random part of a picture that a view sees: of the picture's own shape."""
    area, down, right = view.uniform((3,), "crop").tolist()
    side = view.part(area, default) ** 0.5
    tall, wide = (max(1, round(side * n)) for n in (height, width))
    return round(down * (height - tall)), round(right * (width - wide)), tall, wide


def crop(pictures: np.ndarray, view: View, default: tuple[float, float] = (0.6, 1.0)) -> np.ndarray:
    """What a view sees of (..., H, W, C), the same part of each."""
    height, width = pictures.shape[-3:-1]
    top, left, tall, wide = window(height, width, view, default)
    return pictures[..., top : top + tall, left : left + wide, :]


def mirrored(view: View) -> bool:
    """Whether a view shows the mirror image: half of those that change values do."""
    return bool(view.strength) and view.uniform((), "mirror").item() < 0.5


def recolour(pictures: np.ndarray, view: View) -> np.ndarray:
    """uint8 (..., H, W, 3) in the colours, sharpness and direction that a view gives, all alike; as they are at strength 0.

    At strength 1 brightness, contrast and saturation change by up to 40 %, a fifth of all views is grey and half of them are
    smoothed over neighbouring pixels, after SimCLR's recipe (Chen et al. 2020, arXiv:2002.05709, appendix A).
    """
    if not view.strength:
        return pictures
    if mirrored(view):
        pictures = pictures[..., ::-1, :]
    light, contrast, colour, grey, smooth = view.uniform((5,), "colour").tolist()
    x = pictures.astype(np.float32) * (1 + 0.8 * view.strength * (light - 0.5))
    x = x.mean() + (x - x.mean()) * (1 + 0.8 * view.strength * (contrast - 0.5))
    dull = x @ np.array([[0.299], [0.587], [0.114]], np.float32)
    x = dull + (x - dull) * (0.0 if grey < 0.2 * view.strength else 1 + 0.8 * view.strength * (colour - 0.5))
    if smooth < 0.5 * view.strength:
        for axis in (-3, -2):
            x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 4
    return x.round().clip(0, 255).astype(np.uint8)
