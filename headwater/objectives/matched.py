"""Distillation of features: the model's vectors, or where it looks, are pulled towards a teacher's.

Pooled vectors and tokens of the output (DINOv2's smaller models, arXiv:2304.07193; a frozen start against forgetting, Mendieta et
al. 2023, arXiv:2302.04476; self-distillation for further pretraining, Lee et al. 2022, arXiv:2210.02871), tokens of chosen blocks
(late to early, Zhao et al. 2026, arXiv:2602.05393), and rows of attention (MiniLM, Wang et al. 2020, arXiv:2002.10957).
"""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.init import OUTPUT, Rule
from headwater.model import Model, Reader
from headwater.objectives.distances import Distance, distance_of
from headwater.objectives.guide import Guide, Source
from headwater.objectives.inside import attention_scores, heard
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at
from headwater.objectives.targets.features import trunk_of
from headwater.tokens import Tokens, join


def rows_apart(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the teacher's rows of attention from the student's: scores (T, H, N) and (T, H', N) of T queries -> (T,).

    Head by head, and where their numbers differ of the mean over heads.
    """
    p, q = teacher.softmax(-1), student.log_softmax(-1)
    if p.shape[1] != q.shape[1]:
        p, q = p.mean(1, keepdim=True), (q.exp().mean(1, keepdim=True) + torch.finfo(q.dtype).tiny).log()
    return (torch.xlogy(p, p) - p * q).sum(-1).mean(1)


def inside(model: Model, modality: str, raw: Tokens, block: int | None, attention: bool = False) -> Tensor:
    """Of one modality alone, for its N raw tokens: vectors (B, N, D) behind a block, or scores (B, H, N, N) of its attention.

    block: its number; None = the output of the encoder.
    """
    encoder, (rows, length) = model.encoder(modality), raw.position.shape[:2]
    if block is None:
        return encoder(encoder.embed(raw)).x[:, :length]  # registers stand behind
    place: Any = trunk_of(encoder).blocks[block]
    scores = None
    with heard(place) as calls:
        if attention:
            scores, _ = attention_scores(place.attn, lambda: encoder(encoder.embed(raw)))
        else:
            encoder(encoder.embed(raw))
    said = calls[0][1]
    if len(said) != rows or said.shape[1] < length:
        raise ValueError(
            f"found a block of {type(encoder).__name__} that works on {tuple(said.shape[:2])} tokens where {(rows, length)} came "
            "in (factorised attention does); match the output, or pooled vectors"
        )
    if scores is None:
        return said[:, :length]
    return scores[:, :, :length, :length] + 0 * said.sum()  # through its output FSDP2 learns that the block has a backward pass


def reader_beside(reader: Reader, modality: str) -> Reader:
    """The reader of a teacher, which goes through the random views that the student's modality goes through."""
    reader = copy(reader)
    reader.follows = modality
    return reader


class Matched(Objective):
    """Hides nothing: the same signal goes to a teacher, whose features are wanted. Each modality is encoded alone.

    A teacher that reads the signal in another way than the student (size, patch, mean colour) gets its own tokens of it from the
    loader. Beside another objective in a `Weighted`, it keeps what the teacher knew.

    Args:
        model: the student.
        teacher: see headwater.objectives.guide.
        modality: whose features.
        level: "pooled" vectors, "tokens", or rows of "attention".
        layers: numbers of the student's and the teacher's block (negative from the end), for tokens and attention; None = the
            output, and for attention the last blocks.
        distance: of vectors.
        normalize: give each of the teacher's vectors mean 0 and deviation 1 first.
        weight: factor on the term, which a schedule may let fade to 0; from there on the teacher is not asked.
        momentum: of a teacher that is an average.
    """

    def __init__(
        self,
        model: Model,
        teacher: Source,
        modality: str = "image",
        level: Literal["pooled", "tokens", "attention"] = "pooled",
        layers: tuple[int, int] | None = None,
        distance: Distance = "cosine",
        normalize: bool = False,
        weight: float | Schedule = 1.0,
        momentum: float | Schedule = 0.996,
    ) -> None:
        super().__init__()
        self.modality, self.level, self.normalize, self.weight = modality, level, normalize, weight
        self.teacher = Guide(model, teacher, [modality], momentum)
        mine, theirs = model.encoder(modality), self.teacher.encoder(modality)
        same = mine.reader.spec == theirs.reader.spec
        if level == "attention" and normalize:
            raise ValueError("found normalize for rows of attention, which are distributions; leave it out")
        if level == "pooled" and layers is not None:
            raise ValueError(f"found layers {layers} for pooled vectors, which come from the output; leave layers out")
        if level != "pooled" and not same:
            raise ValueError(
                f"the teacher reads {modality} as {theirs.reader.spec}, the student as {mine.reader.spec}, so their tokens do not "
                "belong together; give both the same settings, or match pooled vectors"
            )
        self.taught = modality if same else f"teacher-{modality.partition('@')[0]}"
        self.needs = (modality,) if same else (modality, self.taught)
        self.readers = {} if same else {self.taught: reader_beside(theirs.reader, modality)}
        self.layers = layers if level != "attention" else layers or (-1, -1)
        if self.layers is not None:
            for who, encoder, number in zip(("student", "teacher"), (mine, theirs), self.layers, strict=True):
                if not -(depth := len(trunk_of(encoder).blocks)) <= number < depth:
                    raise ValueError(f"found layer {number} of the {who}, whose trunk has {depth} blocks, numbered from 0")
        size, wanted = (m.dim(modality) if level == "pooled" else m.encoder(modality).width for m in (model, self.teacher))
        self.out = nn.Identity() if level == "attention" or size == wanted else nn.Linear(size, wanted)
        self.distance = rows_apart if level == "attention" else distance_of(distance)

    def init_rules(self) -> dict[str, Rule]:
        return {"out.weight": OUTPUT} if isinstance(self.out, nn.Linear) else {}

    def start(self, model: Model) -> None:
        self.teacher.start(model)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        own = batch[self.modality]
        if self.level == "pooled":
            return {"matched": torch.isin(own.samples(), batch[self.taught].samples()).sum()}
        return {"matched": own.real().sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        weight, number = at(self.weight, batch.get("progress", 0.0)), self.numbers(batch)["matched"]
        if weight == 0:
            return {"matched": Term(torch.zeros((), device=number.device), number, weight)}
        mine, theirs = self._pooled(model, batch) if self.level == "pooled" else self._inside(model, batch)
        if self.normalize:
            theirs = F.layer_norm(theirs, theirs.shape[-1:])
        total = self.distance(self.out(mine), theirs).sum()
        return {"matched": Term(total, number, weight)}

    def _pooled(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors (S, D) of the samples that both see."""
        name = self.modality
        mine = model.pool(name, model.encode(model.embed({name: batch[name]}))[name])
        with torch.no_grad():
            theirs = self.teacher.represent({name: batch[self.taught]})[name]
        return join(mine, theirs)

    def _inside(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors (T, D) of the real tokens, or rows of attention (T, H, N)."""
        raw, attention = batch[self.modality], self.level == "attention"
        blocks = self.layers or (None, None)
        mine = inside(model, self.modality, raw, blocks[0], attention)
        with torch.no_grad():
            theirs = inside(self.teacher.model, self.modality, raw, blocks[1], attention)
        real = raw.real()
        return (mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real]) if attention else (mine[real], theirs[real])

    def after_step(self, model: Model, progress: float) -> None:
        self.teacher.after_step(model, progress)
