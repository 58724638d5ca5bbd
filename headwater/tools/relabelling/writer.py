"""A backbone that writes: drafts that continue prompts, and how likely they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from headwater.evaluation.choices import Continuation, Scored, continuations
from headwater.evaluation.likelihood import Score, causal_log_p, interleaved_log_p
from headwater.generation import Settings
from headwater.generation.signals import alone, stream
from headwater.hub.backbone import Backbone
from headwater.modalities.text import TextReader
from headwater.tools.decode import KIND
from headwater.tools.relabelling.annotator import Members

Layout = Literal["causal", "interleaved"]


class Writer(nn.Module):
    """A backbone that goes on from prompts, and tells how likely what it wrote is.

    modality: of the texts. given: modalities that stand before them. layout: as in training; see headwater.generate.
    """

    def __init__(self, backbone: Backbone, modality: str = "text", given: Sequence[str] = (), layout: Layout = "causal") -> None:
        super().__init__()
        if stray := {modality, *given} - set(backbone.reader):
            raise ValueError(f"found {', '.join(sorted(stray))}; the modalities of this backbone are {', '.join(backbone.reader)}")
        self.backbone, self.modality = backbone, modality
        self.score: Score = (
            partial(causal_log_p, modality=modality, prefix=tuple(given))
            if layout == "causal"
            else partial(interleaved_log_p, modality=modality, modalities=(*given, modality))
        )

    def drafts(self, prompts: Sequence[str], given: Mapping[str, Sequence[Any]], settings: Settings) -> list[list[Continuation]]:
        """For each prompt the texts that were drawn and are whole, as they continue it. given: signals per prompt."""
        told = {**given, self.modality: prompts} if any(prompts) else given
        *_, t = stream(self.backbone, self.modality, settings, told)
        encoder, draws = self.backbone.model.encoder(self.modality), settings.samples
        out: list[list[Continuation]] = [[] for _ in prompts]
        for place in range(len(prompts) * draws):
            row, prompt, text = place // draws, prompts[place // draws], encoder.restore(alone(t, place))
            rest = text.removeprefix(prompt)
            if text.startswith(prompt) and rest.strip() and self.whole(text, settings.length):
                out[row].append(Continuation(prompt, rest, {name: values[row] for name, values in given.items()}))
        return out

    def whole(self, text: str, length: int | None = None) -> bool:
        """Whether a text ends within the places that it has, or within so many."""
        reader = self.backbone.reader[self.modality]
        if not isinstance(reader, TextReader):
            return True
        return reader.count(text.encode()) + reader.marks <= min(reader.most, length or reader.most)

    def likely(self, asked: Sequence[Continuation]) -> list[Scored]:
        """Log p of each, with the mark behind it."""
        end = self.backbone.reader[self.modality].end is not None
        return continuations(self.backbone, asked, self.score, self.modality, end) if asked else []


def filled(template: str, members: Members, **more: str) -> str:
    """A template with the texts of a sample: members by extension, fields of its .json. ValueError names one that is missing."""
    notes = json.loads(members.get("json", b"{}"))
    texts = {e: content.decode() for e, content in members.items() if KIND.get(e) == "text"}
    told = {**(notes if isinstance(notes, dict) else {}), **texts, **more}
    try:
        return template.format_map(told).strip()
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{template!r} asks for {error}; the sample has {', '.join(told) or 'no text'}") from error
