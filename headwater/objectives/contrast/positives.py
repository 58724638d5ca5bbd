"""Which samples belong together: the targets of contrastive losses, and how much each candidate counts.

A row of the target matrix T says how much each candidate is the row's answer, and w how much it counts among all:
loss_i = - sum_j T_ij log( e^{S_ij} / sum_k w_ik e^{S_ik} ). Rows are asked in blocks, beside all candidates. What is known of
samples travels between ranks, so that N ranks have the targets of one process; labels come from readers of the objective.
Soft targets that come from the vectors themselves are in `soft_positives`, weights of negatives in `hard_negatives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.model import Reader
from headwater.objectives.contrast.scores import Items, Score
from headwater.objectives.objective import Batch, Schedule, at
from headwater.tokens import Tokens

Facts = tuple[Tensor, ...]  # what is known of S samples: tensors (S, ...) without gradient, of equal trailing shape everywhere


class Target(NamedTuple):
    """Of a block of A rows beside C candidates, without gradient.

    t: (A, C) shares that sum to 1 per row (multi-label losses such as the sigmoid ask only t > 0).
    log_w: (A, C) log of the weight of a candidate, -inf = left out; None = all weigh 1.
    """

    t: Tensor
    log_w: Tensor | None = None


class Positives(nn.Module):
    """Built as `Positives(score)`, one for both directions of every pair. Default: each row has its own partner.

    needs, readers: batch entries that `facts` reads, and the label readers that make them. like: facts of no sample, (0, ...),
    which say what a queue has to hold.
    """

    needs: tuple[str, ...] = ()
    readers: Mapping[str, Reader] = MappingProxyType({})
    like: Facts = ()

    def __init__(self, score: Score) -> None:
        super().__init__()

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        """Of this rank's pairs, side `name`: what `forward` wants to know; gathered over ranks and kept in the queue.

        sample: (S,) numbers of the samples in the batch; items: what the score compares, without gradient, of the momentum
        encoder where there is one.
        """
        return ()

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        """A rows beside all C candidates: the global batch first, in the same order on every rank, then the queue.

        own: (A,) the column of each row's own partner. scores: (A, C) with the temperature in, without gradient; -inf at columns
        that are no candidates (empty places of a queue, the row itself), which stay out whatever is said of them here.
        """
        return Target(one_hot(own, scores))

    def after_step(self, progress: float) -> None:
        """Once per optimizer step: moving averages, equal on all ranks."""


class Identity(Positives):
    """Each row's answer is its own partner and nothing else (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748)."""


def one_hot(own: Tensor, scores: Tensor) -> Tensor:
    """(A,) columns -> (A, C) with 1 there, 0 elsewhere."""
    return torch.zeros_like(scores).scatter_(1, own[:, None], 1.0)


def rows_to_one(g: Tensor, own: Tensor, scores: Tensor) -> Tensor:
    """Similarities (A, C) >= 0 -> shares of the candidates (finite scores) that sum to 1; rows without any have their partner."""
    g = g.to(scores.dtype).masked_fill(scores == -torch.inf, 0.0)
    total = g.sum(1, keepdim=True)
    return torch.where(total > 0, g / total.clamp(min=torch.finfo(g.dtype).tiny), one_hot(own, scores))


class SameLabel(Positives):
    """All candidates of the row's label are its answers: a class, an identity, an author, a concept that several samples show.

    SupCon's L_out (Khosla et al. 2020, arXiv:2004.11362; https://github.com/google-research/google-research/tree/master/supcon)
    and, between pictures and texts, UniCL (Yang et al. 2022, arXiv:2204.03610). A sample without a label has its own partner.

    Args:
        score: unused.
        label: reader of one id per sample; of several the largest counts.
        share: of the answers of a row: "evenly", or "by score": by the softmax of their scores, whose gradient is that of
            - log of the answers' summed probability, so that a class may have several modes (LOOK, Feng et al. 2021,
            arXiv:2110.06014; with a queue, as there).
        key: of the labels in the batch.
    """

    def __init__(self, score: Score, label: Reader, share: Literal["evenly", "by score"] = "evenly", key: str = "label") -> None:
        super().__init__(score)
        self.needs, self.readers = (key,), {key: known(label)}
        self.share = share
        self.like = (torch.empty(0, dtype=torch.int64),)

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        """-> ((S,) ids, -1 = no label,)."""
        t = batch[self.needs[0]]
        none = torch.full_like(batch["seed"], -1)
        return (none.scatter_reduce(0, t.sample()[t.real()], t.x[t.real()].long(), "amax")[sample],)

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        same = (rows[0][:, None] == columns[0]) & (rows[0] >= 0)[:, None]
        same |= one_hot(own, scores).bool()
        if self.share == "by score":
            return Target(scores.masked_fill(~same, -torch.inf).softmax(1))
        return Target(rows_to_one(same, own, scores))


class Alike(Positives):
    """(1 - share) of a row's target is its own partner, `share` goes to all candidates in proportion to what they have in common.

    Tags, neighbours in a graph (ConGraT, Brannon et al. 2023, arXiv:2305.14321), the path to the root of a tree of classes, or
    any vector of metadata. With share 0 it is InfoNCE.

    Args:
        score: unused.
        label: reader of a sample's tags, neighbours or ancestors as ids, or of one vector of numbers per sample.
        share: a number or a schedule.
        measure: "jaccard" = ids that both have over ids that either has (a vector of 0 and 1 is a set too), "cosine" = of vectors.
        floor: similarities up to it count as none.
        key: of the labels in the batch.
    """

    def __init__(
        self,
        score: Score,
        label: Reader,
        share: float | Schedule = 0.5,
        measure: Literal["jaccard", "cosine"] = "jaccard",
        floor: float = 0.0,
        key: str = "label",
    ) -> None:
        super().__init__(score)
        check_share(share)
        self.needs, self.readers = (key,), {key: known(label)}
        self.share, self.measure, self.floor, self.vocab = share, measure, floor, label.vocab
        self.progress = 0.0
        kind = torch.float32 if label.vocab is None else torch.uint8
        self.like = (torch.empty(0, label.vocab or label.features, dtype=kind),)

    def facts(self, batch: Batch, name: str, sample: Tensor, items: Items) -> Facts:
        """-> ((S, V) 1 = has this id, or (S, F) the mean of the label's vectors,)."""
        self.progress = batch.get("progress", 0.0)
        return (features(batch[self.needs[0]], self.vocab, len(batch["seed"]))[sample],)

    def forward(self, rows: Facts, columns: Facts, own: Tensor, scores: Tensor) -> Target:
        alike = likeness(rows[0].to(scores.dtype), columns[0].to(scores.dtype), self.measure)
        alike = torch.where(alike > self.floor, alike, 0.0)
        return Target(torch.lerp(one_hot(own, scores), rows_to_one(alike, own, scores), at(self.share, self.progress)))


def features(t: Tokens, vocab: int | None, samples: int) -> Tensor:
    """Labels of all samples of a rank: ids -> (S, V) uint8, 1 = has it; vectors -> (S, F) their mean, 0 where there is none."""
    real, sample = t.real(), t.sample()
    if vocab is not None:
        return torch.zeros(samples, vocab, dtype=torch.uint8, device=t.x.device).index_put(
            (sample[real], t.x[real].long()), torch.ones((), dtype=torch.uint8, device=t.x.device)
        )
    x = t.x[real].nan_to_num(0.0)
    count = x.new_zeros(samples).index_add(0, sample[real], x.new_ones(len(x)))
    return x.new_zeros(samples, x.shape[-1]).index_add(0, sample[real], x) / count.clamp(min=1)[:, None]


def likeness(a: Tensor, b: Tensor, measure: Literal["jaccard", "cosine"]) -> Tensor:
    """(A, F), (C, F) -> (A, C) from 0 to 1; samples that have nothing are like none. Negative cosines are 0."""
    if measure == "cosine":
        return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).clamp(min=0)
    common = a @ b.T
    return common / (a.sum(1)[:, None] + b.sum(1) - common).clamp(min=1)


def known(label: Reader) -> Reader:
    """The reader, if it says what it gives."""
    if label.vocab is None and not label.features:
        raise ValueError(f"{type(label).__name__} has neither vocab nor features; expected a reader of labels, such as Category")
    return label


def check_share(share: float | Schedule) -> None:
    """A number from 0 to 1, or a schedule."""
    if not callable(share) and not 0 <= share <= 1:
        raise ValueError(f"found share {share}; expected 0 (only the own partner) to 1, or a schedule")
