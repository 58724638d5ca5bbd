"""Features of a teacher as the target of masked prediction: it sees the whole signal, the model sees what was kept.

The teacher is a slow copy of the model's own encoder (data2vec, Baevski et al. 2022, arXiv:2202.03555;
https://github.com/facebookresearch/fairseq/tree/main/examples/data2vec) or a tower that was trained before (MVP, Wei et al. 2022,
arXiv:2203.05175; EVA, Fang et al. 2022, arXiv:2211.07636).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.model import Encoder, Model
from headwater.objectives.masks.policies import lengths
from headwater.objectives.objective import Batch, Schedule, Term, at
from headwater.objectives.targets.target import Asked, Target
from headwater.teacher import Teacher
from headwater.tokens import Tokens
from headwater.trunk import Trunk

Norm = Literal["token", "sample", "none"]
Layers = Literal["block", "feed"]


def standardised(t: Tokens, count: int, eps: float = 1e-5) -> Tensor:
    """(B, N, D) vectors with mean 0 and variance 1 per feature over the real tokens of each sample (instance norm over time).

    t.x: (B, N, D) without NaN. count: S, samples in the batch. What is not real becomes zero.
    """
    real, sample = t.real()[..., None], t.sample()
    x, number = t.x * real, lengths(t, count).to(t.x.dtype).clamp(min=1)[:, None]

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros(count, values.shape[-1]).index_add(0, sample.flatten(), values.flatten(0, 1))
        return (total / number)[sample]

    away = (x - mean(x)) * real
    return away / (mean(away.square()) + eps).sqrt()


def levelled(t: Tokens, norm: Norm, count: int) -> Tensor:
    """(B, N, D) features with mean 0 and variance 1, without learned factors: over each token, each sample, or as they are."""
    if norm == "token":
        return F.layer_norm(t.x, t.x.shape[-1:])
    return standardised(t, count) if norm == "sample" else t.x


def layers(encoder: Encoder, raw: Tokens, chosen: list[int], of: Layers) -> list[Tensor]:
    """What blocks of an encoder's trunk give on raw tokens (B, N), without gradient: per chosen block (B, N, D).

    chosen: numbers of blocks, from 0, rising; of: "block" = behind the block, "feed" = its feed-forward branch before the sum.
    """
    blocks, found = trunk_of(encoder).blocks, []
    places = [blocks[number].mlp if of == "feed" else blocks[number] for number in chosen]
    handles = [place.register_forward_hook(lambda module, given, x: found.append(x)) for place in places]
    try:
        with torch.no_grad():
            encoder(encoder.embed(raw))
    finally:
        for handle in handles:
            handle.remove()
    rows, length = raw.position.shape[:2]
    if any(x.shape[0] != rows or x.shape[1] < length for x in found):
        raise ValueError(
            f"found blocks of {type(encoder).__name__} that work on {tuple(found[0].shape[:2])} tokens where {(rows, length)} came "
            "in (factorised attention does); take the output of the whole encoder instead"
        )
    return [x[:, :length] for x in found]  # registers stand behind


def trunk_of(encoder: Encoder) -> Trunk:
    """The trunk whose blocks can be looked into."""
    trunk = getattr(encoder, "trunk", None)
    if not isinstance(trunk, Trunk):
        raise ValueError(
            f"{type(encoder).__name__} has no Trunk whose blocks could be read; take the output of the whole encoder, or convert "
            "the tower with load_backbone(NAME, native=True) and save it"
        )
    return trunk


def same_signal(encoder: Encoder, tower: Encoder, modality: str) -> None:
    """A tower can only look at tokens that were made as its own are."""
    if encoder.reader.spec != tower.reader.spec:
        raise ValueError(
            f"the tower for {modality} reads {tower.reader.spec}, but the model's encoder reads {encoder.reader.spec}; give the "
            "encoder the same settings, so that both have the same tokens"
        )


class Features(Target):
    """Contextual features of a teacher that sees everything.

    Without `tower` the teacher is a moving average of the model's own encoder. Its answer is the mean over the last `top` blocks
    of their feed-forward branches, each normalised (data2vec, section 3.3: over the sample for speech, over the token for
    pictures and text), or with top: 0 the normalised output of the encoder, which every encoder has.

    Args:
        model: its encoder is copied.
        modality: whose tokens are hidden.
        tower: a trained encoder that stays as it is; it reads the signal as the model's encoder does.
        top: blocks that are averaged; 0 = the encoder's output.
        norm: "token", "sample" or "none".
        momentum: of the moving average per step; it may rise over the run.
    """

    def __init__(
        self,
        model: Model,
        modality: str,
        tower: Encoder | None = None,
        top: int = 0,
        norm: Norm = "token",
        momentum: float | Schedule = 0.999,
    ) -> None:
        super().__init__(model, modality)
        encoder = tower or model.encoder(modality)
        if tower is not None:
            same_signal(model.encoder(modality), tower, modality)
        if top and top > (depth := len(trunk_of(encoder).blocks)):
            raise ValueError(f"found top {top} for {modality}, whose teacher has {depth} blocks; expected at most as many")
        if not 0 <= at(momentum, 0.0) <= 1:
            raise ValueError(f"found momentum {at(momentum, 0.0)}; expected 0 to 1, for example 0.999")
        self.size, self.own, self.top, self.norm, self.momentum = encoder.width, tower is None, top, norm, momentum
        self.teacher: Any = Teacher(encoder)
        self.settled = tower is not None  # what was trained before is not drawn anew when training starts

    def start(self, model: Model) -> None:
        if self.own:
            self.teacher.copy(model.encoder(self.modality))

    def look(self, model: Model, batch: Batch) -> Tensor:
        raw, count = batch[self.modality], len(batch["seed"])
        if self.top:
            depth = len(self.teacher.trunk.blocks)
            found = layers(self.teacher.module, raw, list(range(depth - self.top, depth)), "feed")
        else:
            found = [self.teacher(self.teacher.embed(raw)).x[:, : raw.position.shape[1]]]
        return torch.stack([levelled(raw._replace(x=x), self.norm, count) for x in found]).mean(0)

    def answer(self, asked: Asked) -> tuple[Tensor, dict[str, Term]]:
        if asked.seen is None:
            raise ValueError("Features was asked before it looked; call `look` on the batch and pass its hints to `task`")
        return asked.seen, {}

    def after_step(self, model: Model, progress: float) -> None:
        if self.own:
            self.teacher.follow(model.encoder(self.modality), at(self.momentum, progress))
