"""Pictures of one thing each become pictures in which it has to be found: pasted somewhere, with the box in the .json."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from headwater.datamodules.collate import Sample
from headwater.datamodules.streams import Readers, Stream, fitting
from headwater.view import View


class Pasted(Stream):
    """Every picture stands at a drawn place of a white square, and a list of one box is added to the fields of the .json.

    The box is {"left", "top", "right", "bottom"} from 0 to 1 and "kind", a field of the .json. With `views` of the picture the
    place is drawn anew each time, and is all that the view changes; without, a picture always stands at one place. Pasting
    makes data for detection (Ghiasi et al. 2020, arXiv:2012.07177).

    Args:
        kind: field that says what is on the picture.
        share: smallest and largest side of the picture over that of the square.
        image: name of the modality.
        field: of the list of boxes.
    """

    def __init__(
        self, kind: str = "category", share: tuple[float, float] = (0.3, 0.7), image: str = "image", field: str = "boxes"
    ) -> None:
        super().__init__()
        if not 0 < share[0] <= share[1] <= 1:
            raise ValueError(f"found share {share}; expected 0 < smallest <= largest <= 1, for example [0.3, 0.7]")
        self.kind, self.share, self.image, self.field = kind, share, image, field

    def wanted(self, readers: Readers, members: Any) -> frozenset[str]:
        return super().wanted(readers, members) | (frozenset({"json"}) & frozenset(members))

    def tokens(self, readers: Readers, members: dict[str, bytes], views: Mapping[str, View]) -> tuple[Sample, dict[str, Exception]]:
        reader = readers.get(self.image)
        member = None if reader is None else reader.member(members)
        if reader is None or member is None or "json" not in members:
            return super().tokens(readers, members, views)
        try:
            view = replace(views.get(self.image, View(seed=zlib.crc32(members[member]))), share=self.share)
            picture, box = paste(reader.decode(members), view)
            fields = json.loads(members["json"])
            fields[self.field] = [box | {"kind": fields.get(self.kind)}]
            found = {self.image: fitting(reader, reader.tokens(picture))}
        except Exception as error:  # any decoder may raise anything on damaged bytes; the sample is named, not lost
            return {}, {self.image: error}
        others = {name: other for name, other in readers.items() if name != self.image}
        sample, faults = super().tokens(others, {**members, "json": json.dumps(fields).encode()}, views)
        return found | sample, faults


def paste(picture: np.ndarray, view: View) -> tuple[np.ndarray, dict[str, float]]:
    """uint8 (H, W, 3) -> a white square that holds it, as large and where the view's seed says, and its box from 0 to 1."""
    height, width = picture.shape[:2]
    size, down, right = view.uniform((3,), "pasted").tolist()
    side = round(max(height, width) / view.part(size, (1.0, 1.0)))
    top, left = round(down * (side - height)), round(right * (side - width))
    square = np.full((side, side, 3), 255, np.uint8)
    square[top : top + height, left : left + width] = picture
    edges = {"left": left, "top": top, "right": left + width, "bottom": top + height}
    return square, {name: edge / side for name, edge in edges.items()}
