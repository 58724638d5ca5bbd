"""Self-distillation across views: what the student says of one view is what its averaged teacher says of another.

DINO (Caron et al. 2021, arXiv:2104.14294; https://github.com/facebookresearch/dino), with hidden tokens iBOT (Zhou et al. 2021,
arXiv:2111.07832; https://github.com/bytedance/ibot), with these and spreading DINOv2 (Oquab et al. 2023, arXiv:2304.07193;
https://github.com/facebookresearch/dinov2); with Regression in place of Prototypes BYOL (Grill et al. 2020, arXiv:2006.07733)
and SimSiam (Chen and He 2020, arXiv:2011.10566).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from headwater import random
from headwater.init import TABLE, Rule
from headwater.model import Model
from headwater.objectives import regularisers
from headwater.objectives.comparison import Comparison, Prototypes, agreement
from headwater.objectives.masks.policies import Blocks, Policy
from headwater.objectives.objective import Batch, Objective, Schedule, Term, at, part, wide
from headwater.teacher import Teacher
from headwater.tokens import Pooled, Tokens, in_all, of
from headwater.view import View

LARGE, SMALL = View(share=(0.4, 1.0), strength=1.0), View(share=(0.05, 0.4), scale=0.5, strength=1.0)


@dataclass
class Hidden:
    """What is hidden in the student's large views, to be answered token by token as the teacher does, who sees it.

    Args:
        policy: which tokens. ratio: range of the share of a view's tokens. share: of the views in which something is hidden.
        compare: how tokens are held against each other; None = as vectors are, and by the same head.
    """

    policy: Policy = field(default_factory=Blocks)
    ratio: tuple[float, float] = (0.1, 0.5)
    share: float = 0.5
    compare: Callable[[int], Comparison] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio[0] <= self.ratio[1] < 1 or not 0 < self.share <= 1:
            raise ValueError(f"found ratio {self.ratio} and share {self.share}; expected a range within 0 and 1, and above 0 to 1")

    def ratios(self, seed: Tensor, name: str) -> Tensor:
        """(S,) seeds -> (S,) the share of each sample's tokens that is hidden, 0 where none is."""
        draw = random.uniform(seed, (2,), f"{name}/ratio")
        return torch.where(draw[:, 0] < self.share, self.ratio[0] + (self.ratio[1] - self.ratio[0]) * draw[:, 1], 0.0)


class SelfDistillation(Objective):
    """Hides from the student how the teacher sees a sample: large views go to both, small ones to the student only.

    With one large view and nothing hidden the student sees the small ones alone, from which it tells the whole (the part for
    pictures of SILC, Naeem et al. 2023, arXiv:2310.13355). Vectors are those that the encoder pools, before any shared space.

    Args:
        model: its encoder is the student.
        modality: any whose reader makes views.
        compare: how answers are held against each other, made from the size of a vector.
        larges, smalls: how many views there are of each kind. large, small: what they look like.
        momentum: share of itself that the teacher keeps in a step; None = the student's own answers, without gradient.
        hidden: tokens to be answered too (iBOT); None = none.
        spread: weight of the term that keeps large views of different samples apart (KoLeo), 0.1 in DINOv2.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        modality: str = "image",
        compare: Callable[[int], Comparison] = Prototypes,
        larges: int = 2,
        smalls: int = 4,
        large: View = LARGE,
        small: View = SMALL,
        momentum: float | Schedule | None = 0.996,
        hidden: Hidden | None = None,
        spread: float = 0.0,
    ) -> None:
        super().__init__()
        if larges < 1 or smalls < 0 or larges + smalls < 2:
            raise ValueError(f"found {larges} large and {smalls} small views; expected at least one large and two together")
        if momentum is None and (hidden is not None or larges < 2):
            raise ValueError("found no momentum; without a teacher expected two large views or more, and nothing hidden")
        if momentum is not None and not 0 <= at(momentum, 0.0) <= 1:
            raise ValueError(f"found momentum {at(momentum, 0.0)}; expected the share, 0 to 1, that the teacher keeps of itself")
        if spread and larges == 1 and hidden is None:
            raise ValueError("found spread and one large view, which the student does not see; set larges: 2")
        encoder = model.encoder(modality)
        self.modality, self.momentum, self.hidden, self.weight = modality, momentum, hidden, spread
        self.large = tuple(f"{modality}@global{i}" for i in range(larges))
        small_keys = tuple(f"{modality}@local{i}" for i in range(smalls))
        self.needs = (*self.large, *small_keys)
        self.seen = small_keys if larges == 1 and hidden is None else self.needs
        self.masks = {key: f"{key}/hidden" for key in self.large} if hidden else {}
        self.views = dict.fromkeys(self.large, large) | dict.fromkeys(small_keys, small)
        self.compare = compare(encoder.dim)
        self.compare_tokens = None
        if hidden is not None:
            self.compare_tokens = (hidden.compare or compare)(encoder.width)
            if hidden.compare is None:
                self.compare_tokens.head = self.compare.head
            self.mask = nn.Parameter(torch.randn(encoder.embedded) * 0.02)
        self.teacher = None if momentum is None else Teacher(self._taught(model))

    def init_rules(self) -> dict[str, Rule]:
        return {"mask": TABLE} if self.hidden else {}

    def _taught(self, model: Model) -> nn.ModuleDict:
        """What the teacher is a copy of."""
        found = nn.ModuleDict({"model": model.only([self.modality]), "head": self.compare.head})
        if self.compare_tokens is not None:
            found["token_head"] = self.compare_tokens.head
        return found

    def start(self, model: Model) -> None:
        if self.teacher is not None:
            self.teacher.copy(self._taught(model))

    def task(self, batch: Batch, hints: None = None) -> Batch:
        if self.hidden is None:
            return batch
        masks = {}
        for key, name in self.masks.items():
            ratio = self.hidden.ratios(batch["seed"], name)
            masks[name] = batch[key]._replace(x=self.hidden.policy(batch[key], batch["seed"], ratio, name))
        return {**batch, **masks}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        """Samples that have all views, and large views in which tokens may be hidden."""
        number = torch.tensor(len(in_all([batch[key].samples() for key in self.needs])), device=batch["seed"].device)
        found = {"views": number} | ({"spread": number} if self.weight else {})
        if self.masks:
            found["tokens"] = number.new_tensor(sum(len(batch[key].samples()) for key in self.large))
        return found

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        progress, numbers = batch.get("progress", 0.0), self.numbers(batch)
        sample = in_all([batch[key].samples() for key in self.needs])
        names = (*self.seen, *self.masks.values())
        student = model.in_pieces(partial(self._vectors, model, hide=True), part(batch, names))
        x = torch.stack([of(student[key], sample) for key in self.seen])
        z = self.compare.head(x)
        teacher, y = {}, z[: len(self.large)].detach()
        if self.teacher is not None:
            teacher = self._teach(batch)
            y = self._say("head", torch.stack([of(teacher[key], sample) for key in self.large]))
        targets = self.compare.targets(y.flatten(0, 1), progress)
        agreed = agreement(self.compare.answers(z), targets.view(y.shape), self.seen == self.needs)
        total = self.compare.error(agreed).sum()
        terms = {"views": Term(total, numbers["views"], metrics=self.compare.metrics(targets))}
        if self.weight:
            apart = torch.stack([regularisers.spread(wide(v)) for v in x[: len(self.large)]]).mean()
            terms["spread"] = Term(apart * numbers["spread"], numbers["spread"], self.weight)
        if self.masks:
            terms["tokens"] = Term(self._tokens(student, teacher, progress), numbers["tokens"])
        return terms

    @torch.no_grad()
    def _teach(self, batch: Batch) -> dict[str, Pooled]:
        """The teacher's vectors of the large views, of which nothing is hidden from it."""
        names = (*self.large, *self.masks.values())
        return self._vectors(self.teacher.module["model"], part(batch, names), hide=False)  # type: ignore[arg-type, index, union-attr]

    @torch.no_grad()
    def _say(self, head: str, x: Tensor) -> Tensor:
        """What one of the teacher's heads says."""
        return self.teacher.module[head](x)  # type: ignore[index, operator, union-attr]

    def _vectors(self, model: Model, given: dict[str, Tokens], hide: bool) -> dict[str, Pooled]:
        """One vector per sample of every view, and those of the tokens that masks in `given` name."""
        parts = model.embed({key: t for key, t in given.items() if key in self.needs})
        hidden = {key: given[name].x for key, name in self.masks.items()}
        if hide:
            for key, chosen in hidden.items():
                x = parts[key].x
                parts[key] = parts[key]._replace(x=torch.where(chosen[..., None], self.mask.to(x.dtype), x))
        encoded = model.encode(parts)
        out = {key: model.encoder(key).pool(t) for key, t in encoded.items()}
        return out | {self.masks[key]: picked(encoded[key], chosen) for key, chosen in hidden.items()}

    def _tokens(self, student: dict[str, Pooled], teacher: dict[str, Pooled], progress: float) -> Tensor:
        """Sum over large views of the mean error at their hidden tokens."""
        compare: Comparison = self.compare_tokens  # type: ignore[assignment]
        names = self.masks.values()
        answers = compare.answers(compare.head(torch.cat([student[name].x for name in names])))
        targets = compare.targets(self._say("token_head", torch.cat([teacher[name].x for name in names])), progress)
        among = torch.cat([student[name].sample.bincount()[student[name].sample] for name in names])
        return (compare.error(torch.linalg.vecdot(answers, targets)) / among).sum()

    @torch.no_grad()
    def after_step(self, model: Model, progress: float) -> None:
        if self.teacher is not None:
            self.teacher.follow(self._taught(model), at(self.momentum, progress))  # type: ignore[arg-type]
        for compare in (self.compare, self.compare_tokens):
            if compare is not None:
                compare.after_step()


def picked(t: Tokens, chosen: Tensor) -> Pooled:
    """The chosen tokens (B, N), without those that an encoder put behind, in the order of their samples."""
    length = chosen.shape[1]
    sample = t.sample()[:, :length][chosen]
    order = sample.argsort(stable=True)
    return Pooled(t.x[:, :length][chosen][order], sample[order])
