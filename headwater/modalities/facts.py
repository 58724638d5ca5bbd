"""What is known of a sample as text: its source, its topic, its author."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from headwater import random
from headwater.modalities.image import grid
from headwater.modalities.label import fields, row
from headwater.modalities.text import BYTES, TextReader
from headwater.tokens import Tokens
from headwater.view import View


class Facts(TextReader):
    """Fields of the .json -> ids of "category: travel & places\\n\\n", a line per field and an empty one, without marks.

    A field that is absent or null has no line; a sample without any has no tokens. Lists are joined by commas.

    Args:
        fields: of the .json, in the order in which they are told.
        tokenizer: that of the text it stands before; see TextReader.
        length: the most tokens; the last are cut off.
        member: extension of the member.
    """

    def __init__(self, fields: list[str], tokenizer: str = BYTES, length: int = 64, member: str = "json") -> None:
        super().__init__(tokenizer, length, end="")
        if not fields:
            raise ValueError("found no fields; expected the names of some in the .json")
        self.fields, self.extensions = fields, (member,)  # type: ignore[misc, assignment]

    def length(self, facts: dict[str, float]) -> int:
        return self.most  # the bytes of the member do not tell

    def decode(self, members: dict[str, bytes]) -> dict[str, Any]:  # type: ignore[override]
        return fields(members[str(self.member(members))].decode("utf-8"))

    def tokens(self, signal: Mapping[str, Any], view: View | None = None) -> Tokens:  # type: ignore[override]
        known = [(name, signal[name]) for name in self.fields if signal.get(name) is not None]
        if not known:
            return row([], [])
        told = "".join(f"{name}: {', '.join(map(str, v)) if isinstance(v, list) else v}\n" for name, v in known) + "\n"
        ids = np.array(self.ids(told), np.int64)[: self.most]
        return Tokens(torch.from_numpy(ids), grid(len(ids)))

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform_of(seed, (n, len(self.fields)), "facts") * 3
        known = [[("sea", "hill", None)[int(k)] for k in draw] for draw in draws]
        return [self.tokens(dict(zip(self.fields, values, strict=True))) for values in known]
