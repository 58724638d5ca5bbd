"""Some moments of a signal have changed places, and each is asked when it really was.

Frame order modelling of HERO (Li et al. 2020, arXiv:2005.00200) and temporal reordering of MERLOT (Zellers et al. 2021,
arXiv:2106.02636). Places stay where they are and contents are exchanged, so that nothing but the contents can tell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import OUTPUT, Rule
from headwater.model import Model
from headwater.objectives.moments import groups, moved, steps
from headwater.objectives.objective import Batch, Objective, Term, check_context, cross_entropy, part


def ranks(group: Tensor, draw: Tensor) -> Tensor:
    """(M,) the rank of each draw among those of its group; groups (M,) are sorted."""
    by_draw = draw.argsort(stable=True)
    order = by_draw[group[by_draw].argsort(stable=True)]
    place = torch.arange(len(group), device=group.device)
    return torch.empty_like(place).index_copy(0, order, place - torch.searchsorted(group, group))


def exchanged(sample: Tensor, chosen: Tensor, draw: Tensor) -> Tensor:
    """(M,) for each of M moments, sorted by sample, the one whose content it gets: chosen ones of a sample change among themselves.

    chosen: (M,) bool; draw: (M,), whose rank r among the chosen ones of a sample says that it gets the content of the r-th.
    """
    mine = chosen.nonzero()[:, 0]
    first = torch.searchsorted(sample[mine], sample[mine])
    return torch.arange(len(sample), device=sample.device).index_put((mine,), mine[first + ranks(sample[mine], draw[mine])])


class Shuffled(Objective):
    """Hides the order of a share of the moments of one modality.

    Args:
        model: its tokens, fused with the context if there is any, are asked.
        modality: whose moments change places. Samples with fewer than two to exchange, or with moments of different sizes,
            count nothing.
        ratio: smallest and largest share of each sample's moments that are exchanged.
        length: how many moments can be told apart; those beyond the last count as the last.
        context: other modalities that may help, through the model's fusion.
    """

    def __init__(
        self,
        model: Model,
        modality: str = "video",
        ratio: tuple[float, float] = (0.15, 0.4),
        length: int = 16,
        context: list[str] | None = None,
    ) -> None:
        super().__init__()
        check_context(model, modality, context or ())
        if not 0 < ratio[0] <= ratio[1] <= 1 or length < 2:
            raise ValueError(f"found ratio {ratio} and length {length}; expected shares from 0 to 1, rising, and 2 moments or more")
        self.modality, self.ratio, self.length = modality, ratio, length
        self.needs, self.classes = (modality, *(context or ())), length
        self.head = nn.Linear(model.width(modality) if context else model.encoder(modality).width, length)

    def init_rules(self) -> dict[str, Rule]:
        return {"head.weight": OUTPUT}

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """The modality with moments exchanged; "moment" (M,): when each really was, -1 where it is not asked."""
        t, seed = batch[self.modality], batch["seed"]
        found, regular = groups(t), steps(t, len(seed))
        low, high = self.ratio
        share = low + (high - low) * random.uniform(seed, (), "shuffled/share")
        count = (share * regular.moments).round().long().clamp(min=2).minimum(regular.moments)
        count = torch.where((regular.size > 0) & (regular.moments > 1), count, 0)
        own = random.fold(seed[found.sample], found.number)
        first = random.uniform(own, (), "shuffled/chosen")
        chosen = ranks(found.sample, first) < count[found.sample]
        source = exchanged(found.sample, chosen, random.uniform(own, (), "shuffled/order"))
        size = regular.size[t.sample()].clamp(min=1)
        inside = (found.member >= 0) & (regular.size[t.sample()] > 0)
        moment = found._replace(number=found.number[source]).place()
        place = torch.where(inside, moment * size + t.place() % size, t.place())
        asked = torch.where(chosen, found.number[source], -1)
        return {**batch, self.modality: t._replace(x=moved(t, place)), "moment": asked}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"shuffled": (batch["moment"] >= 0).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        t, asked = batch[self.modality], batch["moment"] >= 0
        parts = model.embed(part(batch, self.needs))
        y = (model(parts) if len(self.needs) > 1 else model.encode(parts))[self.modality]
        found = groups(t)
        logits = self.head(found.mean(y.x[:, : t.position.shape[1]])[asked])
        truth = batch["moment"][asked].clamp(max=self.length - 1)
        with torch.no_grad():
            metrics = self._metrics(logits.argmax(-1), truth, found.sample[asked])
        return {"shuffled": Term(cross_entropy(logits, truth).sum(), asked.sum(), metrics=metrics)}

    @staticmethod
    def _metrics(guess: Tensor, truth: Tensor, sample: Tensor) -> dict[str, Tensor]:
        """Share of right moments, and of neighbouring questions of a sample whose answers are in the right order."""
        if not len(truth):
            return {}
        pair = sample[1:] == sample[:-1]
        right = (guess.diff().sign() == truth.diff().sign())[pair]
        ordered = {"in_order": right.float().mean()} if len(right) else {}
        return {"accuracy": (guess == truth).float().mean()} | ordered
