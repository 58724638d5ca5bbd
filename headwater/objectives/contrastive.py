"""Contrastive alignment: samples are told apart by what another modality, or another view of the same one, says of them.

CLIP (Radford et al. 2021, arXiv:2103.00020; https://github.com/mlfoundations/open_clip) and its relatives: what is compared is a
`Score`, what it should look like a `Loss`, who belongs together `Positives`. Candidates are those of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import distributed
from headwater.model import Model
from headwater.objectives.contrast.candidates import Candidates, Rows, contrast
from headwater.objectives.contrast.losses import Loss, Softmax
from headwater.objectives.contrast.positives import Identity, Positives
from headwater.objectives.contrast.queue import Queue
from headwater.objectives.contrast.scores import Cosine, Items, Score
from headwater.objectives.contrast.tiles import softmax_both_ways
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, part, viewed
from headwater.teacher import Teacher
from headwater.tokens import Pooled, Tokens
from headwater.view import View


class Found(NamedTuple):
    """What a score compares of one modality of this rank. items: (S, ...); sample: (S,) sorted numbers in the batch."""

    items: Items
    sample: Tensor


def compared(model: Model, score: Score, given: dict[str, Tokens]) -> dict[str, Found]:
    """Every modality alone, encoded piece by piece where the model is told to."""

    def ask(piece: dict[str, Tokens]) -> dict[str, Pooled]:
        return {name: score.vectors(model, name, t) for name, t in model.encode(model.embed(piece)).items()}

    vectors = model.in_pieces(ask, given)
    return {name: Found(score.items(name, v), v.sample.unique()) for name, v in vectors.items()}


def join(a: Found, b: Found) -> tuple[Found, Found]:
    """The samples that both have, in the same order."""

    def kept(found: Found, other: Found) -> Found:
        both = torch.isin(found.sample, other.sample)
        return Found(tuple(item[both] for item in found.items), found.sample[both])

    return kept(a, b), kept(b, a)


def gather(items: Items, vary: bool = False) -> Items:
    """Those of all ranks in rank order, with gradient. vary: sizes behind the first are filled up to the largest on any rank."""
    every = []
    for item in items:
        if vary and item.ndim > 1:
            shape = torch.tensor(item.shape[1:], device=item.device)[None]
            most = distributed.gather(shape)[0].amax(0).tolist()
            item = F.pad(item, [n for size, held in zip(most[::-1], item.shape[:0:-1], strict=True) for n in (0, size - held)])
        every.append(distributed.gather(item.byte())[0].bool() if item.dtype == torch.bool else distributed.gather(item)[0])
    return tuple(every)


class Pair(nn.Module):
    """Two modalities, or views of one, that are compared: their loss, and the queue of each side that is a candidate."""

    def __init__(self, a: str, b: str, weight: float, loss: Loss, queues: dict[str, Queue]) -> None:
        super().__init__()
        self.a, self.b, self.weight, self.loss = a, b, weight, loss
        self.queues: Any = nn.ModuleDict(queues)
        self.keys: dict[str, list[Tensor]] = {}  # of the last forward pass, pushed when the step is done
        self.names = (a, b)

    def directions(self, which: str) -> list[tuple[str, str]]:
        """(rows, candidates) of each direction."""
        return {"forth": [(self.a, self.b)], "back": [(self.b, self.a)], "both": [(self.a, self.b), (self.b, self.a)]}[which]

    def after_step(self) -> None:
        self.loss.after_step()
        for name, keys in self.keys.items():
            self.queues[name].push(keys)
        self.keys = {}


class Contrastive(Objective):
    """Hides which `a` belongs to which `b`. Encoders see one modality each: fused features would leak the pair.

    Args:
        model: gives pooled vectors, of equal size (`space` of the model).
        a, b: two modalities, or two views of one ("image@0", "image@1").
        pairs: [a, b, weight] for more than two, in place of a and b. A sample counts in those pairs of which it has both.
        loss: of a matrix of scores; every pair has its own, with its own temperature.
        score: how alike two samples are.
        positives: who belongs together; None = partners alone.
        directions: rows are a's ("forth"), b's ("back"), or each in turn with half the weight.
        within: a row's candidates are the others of its own side too (SimCLR, arXiv:2002.05709).
        momentum: candidates come from a copy of encoders and heads that follows them with this momentum (MoCo, arXiv:1911.05722).
        queue: candidates of past steps that are kept for each side.
        views: how random views among a and b are made; one that is not named here is the reader's own.
        tile: scores (of sets: cosines of tokens) that exist at once; larger matrices are made in tiles, and again in backward.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        a: str = "image",
        b: str = "text",
        pairs: list[tuple[str, str, float]] | None = None,
        loss: Callable[[], Loss] = Softmax,
        score: Callable[[Model, Sequence[str]], Score] = Cosine,
        positives: Callable[[Score], Positives] | None = None,
        directions: Literal["both", "forth", "back"] = "both",
        within: bool = False,
        momentum: float | Schedule | None = None,
        queue: int | None = None,
        views: dict[str, View] | None = None,
        tile: int = 1 << 23,
    ) -> None:
        super().__init__()
        chosen = [(a, b, 1.0)] if pairs is None else [(x, y, float(weight)) for x, y, weight in pairs]
        self.names = tuple(dict.fromkeys(name for x, y, _ in chosen for name in (x, y)))
        self.views = viewed(self.names, views)
        check(chosen)
        self.score = score(model, self.names)
        self.positives = Identity(self.score) if positives is None else positives(self.score)
        self.needs, self.readers = (*self.names, *self.positives.needs), dict(self.positives.readers)
        if queue is not None and self.score.like is None:
            raise ValueError(f"found queue: {queue} with {type(self.score).__name__}, whose items vary in size; leave it out")
        like = (*(self.score.like or ()), *self.positives.like)

        def queues(x: str, y: str) -> dict[str, Queue]:
            sides = {"both": (x, y), "forth": (y,), "back": (x,)}[directions]
            return {} if queue is None else {side: Queue(queue, like) for side in sides}

        self.pairs: Any = nn.ModuleList(Pair(x, y, weight, loss(), queues(x, y)) for x, y, weight in chosen)
        self.teacher = None if momentum is None else Teacher(nn.ModuleList([model.only(self.names), self.score]))
        self.momentum, self.directions, self.within, self.tile = momentum, directions, within, tile
        self.plain = positives is None and momentum is None and queue is None and not within and directions == "both"

    def start(self, model: Model) -> None:
        if self.teacher is not None:
            self.teacher.copy(nn.ModuleList([model.only(self.names), self.score]))

    def called(self, pair: Pair) -> str:
        """The name of a pair's term."""
        return "contrastive" if len(self.pairs) == 1 else f"{pair.a}-{pair.b}"

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for pair in self.pairs:
            number = torch.isin(batch[pair.a].samples(), batch[pair.b].samples()).sum()
            found |= dict.fromkeys((self.called(pair), *(f"{self.called(pair)}/{key}" for key in self.score.extra)), number)
        return found

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        given = part(batch, self.names)
        found = keys = compared(model, self.score, given)
        if self.teacher is not None:
            with torch.no_grad():
                teacher = cast(Any, self.teacher.module)
                keys = compared(teacher[0], teacher[1], given)
        terms: dict[str, Term] = {}
        with torch.autocast(given[self.names[0]].x.device.type, enabled=False):  # scores times 100 in bf16 would be off by tenths
            for pair in self.pairs:
                terms |= self.compare(pair, found, keys, batch)
        return terms

    def compare(self, pair: Pair, found: dict[str, Found], keys: dict[str, Found], batch: Batch) -> dict[str, Term]:
        """The terms of one pair."""
        rows = dict(zip(pair.names, join(found[pair.a], found[pair.b]), strict=True))
        keyed = rows if keys is found else dict(zip(pair.names, join(keys[pair.a], keys[pair.b]), strict=True))
        sample = rows[pair.a].sample
        own = torch.arange(len(sample), device=sample.device) + sum(
            distributed.lengths(len(sample), sample.device)[: distributed.rank()]
        )
        if self.plain and type(pair.loss) is Softmax and self.score.symmetric:
            every = self.gather(rows[pair.b].items)
            width = len(every[0]) * self.score.cost(rows[pair.a].items, every)

            def logits(*items: Tensor) -> Tensor:
                return pair.loss.logits(self.score(items, every))

            total = softmax_both_ways(logits, rows[pair.a].items, own, width, self.tile)
        else:
            total = self.ask(pair, rows, keyed, own, batch)
        number = torch.tensor(len(sample), device=sample.device)
        name = self.called(pair)
        terms = {name: Term(total, number, pair.weight, pair.loss.metrics())}
        if self.score.extra:
            a, b = rows[pair.a].items, rows[pair.b].items
            for key, (more, weight) in self.score.terms(a, b, self.gather(a), self.gather(b)).items():
                terms[f"{name}/{key}"] = Term(more, number, pair.weight * weight)
        return terms

    def ask(self, pair: Pair, rows: dict[str, Found], keyed: dict[str, Found], own: Tensor, batch: Batch) -> Tensor:
        """The mean over directions of what rows add, beside all that they may be compared with."""
        sample = rows[pair.a].sample
        facts = {n: self.positives.facts(batch, n, sample, tuple(x.detach() for x in keyed[n].items)) for n in pair.names}
        items = {name: self.gather(keyed[name].items) for name in pair.names}
        known = {name: gather(facts[name]) for name in pair.names}
        once = self.plain and pair.loss.symmetric and self.score.symmetric
        totals = []
        for row, other in pair.directions("forth" if once else self.directions):
            candidates = Candidates(items[other], known[other])
            if self.within:
                candidates = candidates.beside(items[row], known[row])
            if pair.queues:
                candidates = candidates.behind(pair.queues[other])
            each = contrast(self.score, pair.loss, self.positives, Rows(rows[row].items, facts[row], own), candidates, self.tile)
            totals.append(pair.loss.total(each))
        if pair.queues and self.training:
            number = distributed.gather(batch["sample"][sample])[0]
            order = number.argsort(stable=True)  # what is kept must not depend on who read which sample
            pair.keys = {name: [x.detach()[order] for x in (*items[name], *known[name])] for name in pair.queues}
        return torch.stack(totals).mean()

    def gather(self, items: Items) -> Items:
        """Those of all ranks."""
        return gather(items, vary=self.score.like is None)

    @torch.no_grad()
    def after_step(self, model: Model, progress: float) -> None:
        for pair in self.pairs:
            pair.after_step()
        self.positives.after_step(progress)
        if self.teacher is not None and self.momentum is not None:
            self.teacher.follow(nn.ModuleList([model.only(self.names), self.score]), at(self.momentum, progress))


def check(pairs: list[tuple[str, str, float]]) -> None:
    """ValueError for pairs that say nothing."""
    if not pairs:
        raise ValueError("found no pairs; expected at least one, such as [image, text, 1.0]")
    if same := [name for name, other, _ in pairs if name == other]:
        raise ValueError(f"found {same[0]} paired with itself; name two views of it, such as {same[0]}@0 and {same[0]}@1")
    if len({frozenset(pair[:2]) for pair in pairs}) < len(pairs):
        raise ValueError(f"found a pair twice in {pairs}; expected each once, with the sum of the weights")
