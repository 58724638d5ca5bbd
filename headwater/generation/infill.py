"""Gaps in texts, filled by a model that learned to write hidden spans behind their marks (`Denoising`, T5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headwater.generation.canvas import Settings
from headwater.generation.signals import fill
from headwater.hub.backbone import Backbone
from headwater.modalities.text import TextReader
from headwater.model import Model


def infill(
    backbone: Backbone | Model,
    pieces: Sequence[Sequence[str]],
    to: str = "text",
    mode: int | None = None,
    marks: int = 0,
    settings: Settings | None = None,
) -> list[str]:
    """Whole texts of their pieces, with what the model puts between each two of them.

    Raffel et al. 2019, arXiv:1910.10683; Tay et al. 2022, arXiv:2205.05131.

    Args:
        backbone: what `load_backbone` gives, or a model.
        pieces: of each text, those around its gaps, with their white space: ["a ", " sat on the ", ""] has two gaps.
        to: the modality of texts.
        mode: which of the reader's extra ids told the model in training that spans are hidden; None = none did.
        marks: the first of the extra ids that stand for what is hidden: in training, those behind the modes.
        settings: how ids are drawn; see headwater.generate. None = the likeliest.
    """
    model = backbone.model if isinstance(backbone, Backbone) else backbone
    reader = model.encoder(to).reader
    if not isinstance(reader, TextReader):
        raise ValueError(f"found {to}, read by {type(reader).__name__}; expected texts, whose gaps have marks")
    free = reader.extras[marks:]
    if wrong := next((text for text in pieces if not 1 < len(text) <= len(free) + 1), None):
        raise ValueError(f"found {len(wrong)} pieces of a text; expected 2 to {len(free) + 1}, for there are {len(free)} marks")
    opening = [] if mode is None else [reader.extras[mode]]
    closing = [] if reader.end is None else [reader.end]
    how = replace(settings or Settings(temperature=0), layout="denoising")
    sources = [torch.tensor([*opening, *joined(reader, text, free), *closing]) for text in pieces]
    *_, made = fill(model, to, how, len(pieces), {}, sources)
    return [filled(reader, text, made.x[row][made.real()[row]], free) for row, text in enumerate(pieces)]


def joined(reader: TextReader, text: Sequence[str], marks: range) -> list[int]:
    """The ids of the pieces, with a mark for every gap."""
    ids = [int(i) for i in reader.ids(text[0])]
    for mark, piece in zip(marks, text[1:], strict=False):
        ids += [mark, *map(int, reader.ids(piece))]
    return ids


def filled(reader: TextReader, text: Sequence[str], said: Tensor, marks: range) -> str:
    """The pieces with what was said behind the mark of each gap; "" where nothing was."""
    spans: dict[int, list[int]] = {mark: [] for mark in marks}
    found: list[int] = []  # what stands before the first mark is lost
    for i in said.tolist():
        if i in spans:
            found = spans[i]
        elif i < reader.known:
            found.append(i)
    gaps = [reader.text(span) for span in spans.values()]
    return text[0] + "".join(gap + piece for gap, piece in zip(gaps, text[1:], strict=False))
