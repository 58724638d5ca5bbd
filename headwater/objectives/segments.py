"""How two pieces of one signal relate: one follows the other, they are swapped, or the second is from another sample.

Next sentence prediction (BERT, Devlin et al. 2018, arXiv:1810.04805), sentence order (ALBERT, Lan et al. 2019, arXiv:1909.11942),
contiguous or random or linked segments (LinkBERT, Yasunaga et al. 2022, arXiv:2203.15827), in any modality that has moments. All
pieces have equally many moments and begin at time 0, so that lengths and places tell nothing. Texts need `end: ""`: a mark would
tell which piece is the last. Linked texts are two modalities of a sample: see Matching.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from headwater import distributed, random
from headwater.model import Model
from headwater.objectives.heads import Projector
from headwater.objectives.masks.policies import indices
from headwater.objectives.matching import Negatives, strangers
from headwater.objectives.moments import groups
from headwater.objectives.objective import Batch, Objective, Term, cross_entropy, part
from headwater.tokens import Tokens

Relation = Literal["next", "swapped", "other"]


def compared(u: Tensor, v: Tensor) -> Tensor:
    """[u; v; |u - v|; u * v]: (K, D), (K, D) -> (K, 4 D) (InferSent, Conneau et al. 2017, arXiv:1705.02364)."""
    return torch.cat([u, v, (u - v).abs(), u * v], -1)


def piece(t: Tokens, moment: Tensor, first: Tensor, length: int) -> Tokens:
    """The tokens of `length` moments from `first` on, which becomes time 0. moment: (B, N) of each token; first: (B, N)."""
    since = moment - first
    t = t._replace(position=torch.cat([since[..., None].to(t.position.dtype), t.position[..., 1:]], -1))
    return t.take(*indices(t.real() & (since >= 0) & (since < length)))


class Segments(Objective):
    """Hides the relation of two neighbouring pieces of each sample; samples that are too short for two count nothing.

    Each piece is encoded alone, once, and is part of all relations: (u, v) are "next", (v, u) "swapped", (u, v of another
    sample of any rank) "other".

    Args:
        model: its pooled vectors are compared.
        modality: what is cut.
        length: moments per piece.
        relations: two or three of those above.
        scorer: "features" = two layers on [u; v; |u - v|; u * v]; "bilinear" = a product u W v per relation.
        negatives: the other sample is drawn "random", or "hard": the more alike to the own v, the more often.
        temperature: of hard negatives.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        modality: str = "text",
        length: int = 4,
        relations: list[Relation] | None = None,
        scorer: Literal["features", "bilinear"] = "features",
        negatives: Negatives = "random",
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.relations: list[Relation] = relations or ["next", "swapped", "other"]
        if length < 1 or len(self.relations) < 2 or len(set(self.relations)) < len(self.relations):
            raise ValueError(
                f"found length {length} and relations {relations}; expected 1 or more moments and two or three relations"
            )
        width, number = model.dim(modality), len(self.relations)
        self.modality, self.needs, self.length, self.classes = modality, (modality,), length, number
        self.negatives, self.temperature = negatives, temperature
        layers = Projector([4 * width, width, number], norm="none")
        self.scorer: nn.Module = layers if scorer == "features" else nn.Bilinear(width, width, number)
        self.pairwise = scorer == "bilinear"

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Both pieces of every sample that is long enough, and how many such samples all ranks have, "pairs"."""
        t, seed = batch[self.modality], batch["seed"]
        found = groups(t)
        count = found.per_sample(len(seed))
        free = (count - 2 * self.length + 1).clamp(min=0)  # places where the first piece may begin
        first = (random.uniform(seed, (), "segments/first").double() * free).long()[t.sample()]
        long = t._replace(valid=t.real() & (free > 0)[t.sample()])
        pieces = [piece(long, found.place(), first + k * self.length, self.length) for k in range(2)]
        pairs = distributed.total((free > 0).sum())
        return {**batch, **dict(zip(self._keys, pieces, strict=True)), "pairs": pairs}

    @property
    def _keys(self) -> tuple[str, str]:
        return f"{self.modality}@first", f"{self.modality}@second"

    def _asked(self, batch: Batch) -> list[Relation]:
        """One sample alone has no other."""
        return [relation for relation in self.relations if relation != "other" or batch["pairs"] > 1]

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        samples = batch[self._keys[0]].samples()
        return {"segments": torch.tensor(len(samples) * len(self._asked(batch)), device=samples.device)}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        pooled = model.represent(part(batch, self._keys))
        u, v = (pooled[key].x for key in self._keys)
        every_v = distributed.gather(v)[0] if "other" in self.relations else v
        pairs, asked = {"next": (u, v), "swapped": (v, u)}, self._asked(batch)
        if "other" in asked:
            pairs["other"] = (u, every_v[self._others(v, every_v, batch["seed"][pooled[self._keys[0]].sample])])
        left, right = (torch.cat([pairs[relation][side] for relation in asked]) for side in (0, 1))
        logits = self.scorer(left, right) if self.pairwise else self.scorer(compared(left, right))
        kind = torch.tensor([self.relations.index(relation) for relation in asked], device=u.device).repeat_interleave(len(u))
        metrics = {"accuracy": (logits.argmax(-1) == kind).float().mean()} if len(kind) else {}
        total = cross_entropy(logits, kind).sum() + 0 * every_v.sum()  # on every rank, whatever it has, the exchange goes back
        return {"segments": Term(total, self.numbers(batch)["segments"], metrics=metrics)}

    @torch.no_grad()
    def _others(self, v: Tensor, every_v: Tensor, seed: Tensor) -> Tensor:
        """(J,) for each sample another one, as a row of all ranks."""
        every_seed, first = distributed.gather(seed)
        score = torch.zeros(len(seed), len(every_seed), device=v.device)
        if self.negatives == "hard":
            a, b = (nn.functional.normalize(x.float(), dim=-1) for x in (v, every_v))
            score = a @ b.T / self.temperature
        return strangers(score, seed, every_seed, first, "segments/other")
