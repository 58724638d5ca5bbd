"""Labels that lie on pictures: they go through the same random view as the picture does."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import torch

from headwater import random
from headwater.modalities.image import grid, opened
from headwater.modalities.label import Label, fields, row
from headwater.modalities.scaling import crop, mirrored, window
from headwater.model import Reader
from headwater.tokens import Tokens
from headwater.view import View

Fit = Literal["pad", "squash"]  # ImageReader's shapes in which all of a view is seen; "native" is "squash" here
BESIDE = 255  # no class


class Boxes(Label):
    """Boxes of a picture -> (left, top, right, bottom) from 0 to 1 of the square that the encoder sees; what lies outside is cut.

    The .json holds a list of boxes in the same form, from 0 to 1 of the whole picture, and its `width` and `height` in pixels.
    Boxes of which a view shows nothing are no tokens. Position: the number of the box. The rounding of a scaled picture to
    whole pixels is left out.

    Args:
        field: of the .json.
        follows: the modality of the picture.
        shape: as the picture's reader has it.
    """

    features = 4

    def __init__(self, field: str = "boxes", follows: str = "image", shape: Fit = "pad") -> None:
        super().__init__(field, "json")
        self.follows, self.shape = follows, shape

    def decode(self, members: dict[str, bytes]) -> Any:
        """(boxes or None, width, height)."""
        found = fields(members["json"].decode("utf-8"))
        boxes = found.get(str(self.field))
        if boxes and not {"width", "height"} <= found.keys():
            raise ValueError(f"found {self.field!r} without the `width` and `height` of the picture in pixels; add them")
        return boxes, found.get("width"), found.get("height")

    def tokens(self, signal: tuple[list[list[float]] | None, int, int], view: View | None = None) -> Tokens:
        boxes, width, height = signal
        if not boxes:
            return row([], [], 4)
        corners = np.asarray(boxes, np.float64).reshape(-1, 2, 2) * [width, height]  # box, corner, (x, y)
        if view is not None:
            top, left, height, width = window(height, width, view)
            corners = corners - [left, top]
            if mirrored(view):
                corners = np.stack([width - corners[:, ::-1, 0], corners[..., 1]], -1)
        corners = corners.clip(0, [width, height])
        seen = np.flatnonzero((corners[:, 1] > corners[:, 0]).all(1))
        sides = np.array([width, height] if self.shape == "squash" else [max(width, height)] * 2)
        placed = (corners + (sides - [width, height]) / 2) / sides
        return row(placed[seen].reshape(-1, 4).tolist(), seen.tolist(), 4)

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, 2, 2, 2), "boxes").sort(-2).values.flatten(2)
        return [row(boxes[: 1 + k % 2].tolist(), [*range(1 + k % 2)], 4) for k, boxes in enumerate(draws)]


class PatchClasses(Reader):
    """A picture of class numbers, one grey level per pixel -> the most frequent class of every patch, at (0, row, column).

    Pixels with a number from `classes` on, such as 255, have none. Patches with more of these than of any class are no tokens.

    Args:
        classes: how many.
        size, patch, shape: as the picture's reader has them.
        member: extension of the member.
        follows: the modality of the picture.
    """

    def __init__(
        self, classes: int, size: int = 64, patch: int = 8, shape: Fit = "pad", member: str = "seg.png", follows: str = "image"
    ) -> None:
        if size % patch or not 0 < classes <= BESIDE:
            raise ValueError(f"found size {size}, patch {patch} and {classes} classes; expected whole patches and 1 to 255 classes")
        self.vocab, self.size, self.patch, self.shape, self.follows = classes, size, patch, shape, follows
        self.extensions = (member,)  # type: ignore[misc]

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        """uint8 (H, W); the numbers of a palette as they are."""
        picture = opened(io.BytesIO(members[str(self.member(members))]))
        return np.asarray(picture if picture.mode in ("L", "P") else picture.convert("L"))

    def tokens(self, signal: np.ndarray, view: View | None = None) -> Tokens:
        levels, side = signal, self.size // self.patch
        if view is not None:
            levels, side = crop(levels[..., None], view)[..., 0], max(1, round(view.scale * side))
            levels = levels[:, ::-1] if mirrored(view) else levels
        laid = nearest(levels, side * self.patch, self.shape).reshape(side, self.patch, side, self.patch)
        pixels = laid.transpose(0, 2, 1, 3).reshape(side * side, -1)
        count = np.stack([(pixels == k).sum(1) for k in range(self.vocab or 0)] + [(pixels >= (self.vocab or 0)).sum(1)], 1)
        most = torch.from_numpy(count.argmax(1))
        known = most < (self.vocab or 0)
        return Tokens(most[known], grid(1, side, side)[known])

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, 2, 2), "patch classes") * (self.vocab or 0)
        return [self.tokens(levels.numpy().astype(np.uint8)) for levels in draws]


def nearest(levels: np.ndarray, size: int, shape: Fit) -> np.ndarray:
    """(H, W) -> (size, size) without mixing numbers, laid out as scaling.fit lays pictures out; BESIDE where there is none."""
    height, width = levels.shape
    scale = size / max(height, width)
    tall, wide = (size, size) if shape == "squash" else (max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = ((np.arange(n) + 0.5) * of / n for n, of in ((tall, height), (wide, width)))
    canvas = np.full((size, size), BESIDE, np.uint8)
    top, left = (size - tall) // 2, (size - wide) // 2
    canvas[top : top + tall, left : left + wide] = levels[rows.astype(int)[:, None], columns.astype(int)]
    return canvas
