"""Labels without a head, by the similarity of pooled vectors: to the names of classes, or to labelled samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.datamodules.collate import collate
from headwater.datamodules.files import File, expand
from headwater.hub.backbone import Backbone, load_backbone
from headwater.modalities.label import Category, named
from headwater.tools.parts import opened
from headwater.tools.relabelling.annotator import Members, identity, listed, read
from headwater.tools.relabelling.labels import Batch, Labels, Voice
from headwater.view import View

ROWS = 64  # labelled samples that go through the model at a time


class Similar(Voice):
    """Classes by the similarity of pooled vectors."""

    def __init__(self, backbone: Backbone, modality: str) -> None:
        super().__init__()
        self.model, self.modality = backbone.model, modality
        self.readers = {modality: backbone.model.encoder(modality).reader}

    def vectors(self, batch: Batch) -> Tensor:
        """(B, D) of length 1."""
        return F.normalize(self.model.represent(self.model.prepare(batch))[self.modality].x.float(), dim=-1)


class Titled(Similar):
    """Softmax of the similarity to each class's name, as CLIP has it."""

    titles: Tensor

    def __init__(self, backbone: Backbone, modality: str, text: str, texts: Sequence[Sequence[str]], temperature: float) -> None:
        super().__init__(backbone, modality)
        each = torch.stack([backbone.embed(**{text: list(one)})[text].mean(0) for one in texts])
        self.register_buffer("titles", F.normalize(each, dim=-1), persistent=False)
        self.temperature = temperature

    def forward(self, batch: Batch) -> Tensor:
        return (self.vectors(batch) @ self.titles.T / self.temperature).softmax(-1)[:, None]


class Names(Labels):
    """Zero-shot: the class whose name, in the mean of some sentences, is most similar (CLIP, Radford et al. 2021,
    arXiv:2103.00020, section 3.1.4).

    Args:
        backbones: folders, checkpoints, or what else `load_backbone` takes, of models with a shared space; several vote.
        classes: their names, or a file with one per line.
        sentences: in which a name stands at {}.
        field: of the .json that the label gets.
        modality: what is looked at.
        text: modality of the names.
        temperature: that similarities are divided by.
        views: random views beside the plain signal, which vote too.
        view: what they are like; none = as each reader finds fit.
    """

    def __init__(
        self,
        backbones: list[str] | str,
        classes: list[str] | str,
        sentences: list[str] | str = "{}",
        field: str = "category",
        modality: str = "image",
        text: str = "text",
        temperature: float = 0.01,
        views: int = 0,
        view: View | None = None,
    ) -> None:
        known, frames = [*named(classes)], listed(sentences)
        texts = [[frame.replace("{}", name) for frame in frames] for name in known]
        loaded = [load_backbone(name).eval() for name in listed(backbones)]
        voices = [Titled(backbone, modality, text, texts, warm(temperature)) for backbone in loaded]
        super().__init__(voices, known, field, "json", views, view)
        self.models = [identity(name, backbone.card) for name, backbone in zip(listed(backbones), loaded)]


class Near(Similar):
    """Votes of the nearest labelled samples."""

    gallery: Tensor
    number: Tensor

    def __init__(self, backbone: Backbone, modality: str, k: int, temperature: float) -> None:
        super().__init__(backbone, modality)
        self.k, self.temperature, self.classes = k, temperature, 0

    @torch.no_grad()
    def learn(self, samples: Sequence[Members], number: Tensor, classes: int) -> None:
        """Keep the vectors of labelled samples, whose classes are (S,)."""
        found: list[Any] = [read(self.readers, one) for one in samples]
        good = torch.tensor([not isinstance(one, str) for one in found])
        rows = [one for one in found if not isinstance(one, str)]
        if not rows:
            raise ValueError(f"none of {len(samples)} labelled samples can be read: {found[0]}")
        pieces = [collate(rows[start : start + ROWS], [self.modality]) for start in range(0, len(rows), ROWS)]
        self.register_buffer("gallery", torch.cat([self.vectors(piece) for piece in pieces]), persistent=False)
        self.register_buffer("number", number[good], persistent=False)
        self.classes = classes

    def forward(self, batch: Batch) -> Tensor:
        return near(self.vectors(batch) @ self.gallery.T, self.number, self.classes, self.k, self.temperature)[:, None]


def near(similarity: Tensor, number: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """(B, C) shares of the votes of the k most similar, each with exp(similarity / temperature) (Wu et al. 2018,
    arXiv:1805.01978). similarity: (B, G) to labelled samples of the classes `number` (G,)."""
    best = similarity.topk(min(k, similarity.shape[1]), 1)
    weight = (best.values / temperature).softmax(1)
    return weight.new_zeros(len(weight), classes).scatter_add_(1, number[best.indices], weight)


class Neighbours(Labels):
    """The classes of the most similar samples of a small labelled source.

    Args:
        backbones: folders, checkpoints, or what else `load_backbone` takes; several vote.
        labelled: shards whose samples have labels; others are passed over.
        field: of the .json where labels stand, and are written.
        modality: what is looked at.
        k: how many of the most similar vote.
        temperature: the smaller, the more the nearest of them counts.
        views: random views beside the plain signal, which vote too.
        view: what they are like; none = as each reader finds fit.
    """

    def __init__(
        self,
        backbones: list[str] | str,
        labelled: str,
        field: str = "category",
        modality: str = "image",
        k: int = 10,
        temperature: float = 0.07,
        views: int = 0,
        view: View | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"found k={k}; expected 1 or more neighbours")
        samples, values = known(labelled, field)
        classes = sorted(set(values))
        number = torch.tensor([classes.index(value) for value in values])
        loaded = [load_backbone(name).eval() for name in listed(backbones)]
        voices = [Near(backbone, modality, k, warm(temperature)) for backbone in loaded]
        for voice in voices:
            voice.learn(samples, number, len(classes))
        super().__init__(voices, classes, field, "json", views, view)
        self.models = [{**identity(name, b.card), "labelled": labelled} for name, b in zip(listed(backbones), loaded)]


def known(shards: str, field: str) -> tuple[list[Members], list[str]]:
    """The samples of shards that have a label in this field, and the label. ValueError where none has."""
    samples, values, reader = [], [], Category(1, field, others=True)
    for path in expand(shards):
        index = opened(path)
        with File(path) as file:
            for row in range(len(index)):
                members = index.read(file, row)
                value = reader.decode(members) if reader.member(members) else None
                if isinstance(value, str | int):
                    samples.append(members)
                    values.append(str(value))
    if not samples:
        raise ValueError(f"found no sample in {shards} with a label in the field {field!r} of its .json; name another field")
    return samples, values


def warm(temperature: float) -> float:
    """A temperature above 0."""
    if temperature <= 0:
        raise ValueError(f"found temperature {temperature}; expected one above 0")
    return temperature
