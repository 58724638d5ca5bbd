"""Pages as words with boxes: ids of a tokenizer whose coordinates are the reading order and the box.

LayoutLM (Xu et al. 2019, arXiv:1912.13318; https://github.com/microsoft/unilm/tree/master/layoutlm).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import nn

from headwater import random
from headwater.modalities.image import grid
from headwater.modalities.text import BYTES, TextReader
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

SPAN = 1000  # boxes are in thousandths of the page


class LayoutReader(TextReader):
    """JSON [{"text": "Total", "box": [x0, y0, x1, y1]}, ...] in reading order -> ids at (index, x0, y0, x1, y1).

    Boxes count from the left and from the top, in thousandths of the page. With {"size": [width, height], "words": [...]} they are
    in the units of that size. Every id of a word has the word's box; a mark before the text has the box (0, 0, 0, 0), the one
    behind it (1000, 1000, 1000, 1000), as LayoutLM's do. Words of white space are left out.

    Args:
        tokenizer: as for TextReader.
        length: the most tokens of a page, marks included.
        start: the token, or its id, before every page; None = none.
        end: the token, or its id, behind every page; None = an id of its own; "" = none.
    """

    extensions = ("layout.json", "words.json")  # type: ignore[assignment]

    def decode(self, members: dict[str, bytes]) -> Any:  # type: ignore[override]
        return json.loads(members[str(self.member(members))])

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        """There is no random view of a page."""
        found = [(int(i), box) for text, box in words(signal) for i in self.ids(text.strip())][: self.most - self.marks]
        if not found:
            raise ValueError("the page has no word")
        if self.start is not None:
            found.insert(0, (self.start, [0] * 4))
        if self.end is not None:
            found.append((self.end, [SPAN] * 4))
        position = torch.tensor([[k, *box] for k, (_, box) in enumerate(found)], dtype=torch.int32)
        return Tokens(torch.tensor([i for i, _ in found]), position)

    def count(self, content: bytes) -> int:
        return sum(len(self.ids(text.strip())) for text, _ in words(json.loads(content)))

    def length(self, facts: dict[str, float]) -> int | None:
        """From `tokens-<digest>` (see `count`); the size of the JSON says little."""
        return super().length(facts) if f"tokens-{self.digest}" in facts else None

    def restore(self, t: Tokens) -> list[dict[str, Any]]:  # type: ignore[override]
        """Words in reading order; neighbours of equal box become one."""
        given = t.map(lambda field: field[:, t.real()[0]])
        first = int(self.start is not None and given.x[0, :1].tolist() == [self.start])
        last = given.x.shape[1] - int(self.end is not None and given.x[0, -1:].tolist() == [self.end])
        boxes = given.position[0, :, 1:5].tolist()
        page = []
        for box, run in groupby(range(first, last), boxes.__getitem__):
            ids = given.x[:, list(run)]
            page.append({"text": super().restore(Tokens(ids, grid(ids.shape[1])[None])), "box": box})
        return page

    def example(self, n: int, seed: int) -> list[Tokens]:
        words = ["a", "dog", "sees", "the", "red", "boat"]
        draws = random.uniform(torch.tensor(seed), (n, 4, 3), "layout").tolist()
        return [
            self.tokens(
                [
                    {"text": words[int(w * len(words))], "box": [int(900 * x), int(900 * y), int(900 * x) + 90, int(900 * y) + 20]}
                    for w, x, y in page[: 2 + k % 3]
                ]
            )
            for k, page in enumerate(draws)
        ]


class Layout(Encoder):
    """A transformer over the words of a page; the box of each is added to its embedding.

    Args:
        trunk: the transformer.
        tokenizer: "bytes", a tokenizer.json, "open_clip:MODEL" or "hf:FOLDER"; see TextReader.
        length: the most tokens of a page, marks included.
        start: the token, or its id, before every page; None = none.
        end: the token, or its id, behind every page; None = an id of its own; "" = none.
        pooling: how tokens become one vector; see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        tokenizer: str = BYTES,
        length: int = 512,
        start: int | str | None = None,
        end: int | str | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(LayoutReader(tokenizer, length, start, end), trunk, pooling)
        self.across, self.down, self.wide, self.tall = (nn.Embedding(SPAN + 1, trunk.width) for _ in range(4))

    def embed(self, raw: Tokens) -> Tokens:
        x0, y0, x1, y1 = raw.position[..., 1:5].long().unbind(-1)
        box = self.across(x0) + self.across(x1) + self.down(y0) + self.down(y1) + self.wide(x1 - x0) + self.tall(y1 - y0)
        return raw._replace(x=self.stem(raw.x) + box)


def words(page: Any) -> list[tuple[str, list[int]]]:
    """Texts and boxes in thousandths of a page. ValueError where a word has no text or its box does not lie on the page."""
    size = page.get("size") if isinstance(page, Mapping) else (SPAN, SPAN)
    listed = page.get("words") if isinstance(page, Mapping) else page
    if not isinstance(listed, list) or not isinstance(size, list | tuple) or len(size) != 2 or min(size) <= 0:
        raise ValueError(
            'found no page; expected [{"text": ..., "box": ...}, ...], or {"size": [width, height], "words": that list}'
        )
    return [word(one, size) for one in listed]


def word(one: Any, size: Any) -> tuple[str, list[int]]:
    """Text and box of one word."""
    text, box = (one.get(name) for name in ("text", "box")) if isinstance(one, Mapping) else (None, None)
    if not isinstance(text, str) or not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError(f'found the word {one!r}; expected {{"text": "...", "box": [x0, y0, x1, y1]}}')
    width, height = size
    if not (0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height):
        raise ValueError(
            f"found the box {list(box)} of {text!r} on a page of {width} x {height}; expected it there, x0 <= x1, y0 <= y1"
        )
    return text, [round(SPAN * n / side) for n, side in zip(box, (width, height) * 2, strict=True)]
