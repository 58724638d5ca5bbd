"""A grid over the whole picture as boxes: regions that need no label and follow any view."""

from __future__ import annotations

import io
from typing import Any

import torch

from headwater.modalities.image import ImageReader
from headwater.modalities.label import row
from headwater.modalities.pixel_label import Boxes
from headwater.modalities.scaling import Shape
from headwater.tokens import Tokens


class Cells(Boxes):
    """`side` x `side` equal boxes of a picture, as `Boxes` gives them; only the header of the file is read.

    Args:
        side: boxes per side.
        follows: the modality of the picture, or a view of it.
        shape: as the picture's reader has it.
    """

    def __init__(self, side: int = 3, follows: str = "image", shape: Shape = "pad") -> None:
        super().__init__("cells", follows, shape)  # type: ignore[arg-type]
        if side < 1:
            raise ValueError(f"found side {side}; expected at least one box")
        self.side, self.extensions = side, ImageReader.extensions  # type: ignore[misc]

    def decode(self, members: dict[str, bytes]) -> Any:
        """(boxes, width, height)."""
        from PIL import Image as Pictures

        with Pictures.open(io.BytesIO(members[str(self.member(members))])) as picture:
            return self._boxes(), *picture.size

    def _boxes(self) -> list[list[float]]:
        ends = [k / self.side for k in range(self.side + 1)]
        return [[ends[x], ends[y], ends[x + 1], ends[y + 1]] for y in range(self.side) for x in range(self.side)]

    def example(self, n: int, seed: int) -> list[Tokens]:
        return [row(torch.tensor(self._boxes())[k % 2 :].tolist(), [*range(k % 2, self.side**2)], 4) for k in range(n)]
