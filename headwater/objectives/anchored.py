"""A pull back to where the weights started, so that what was learned before is not lost: no data is hidden, and none is read.

Towards the starting point equally from everywhere (L2-SP, Li et al. 2018, arXiv:1802.01483), or harder along what mattered for
earlier data (EWC, Kirkpatrick et al. 2017, arXiv:1612.00796).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headwater.init import ZERO, Rule
from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, Term, weighted_sum
from headwater.teacher import Teacher
from headwater.tokens import Tokens, split_rows


def pull(values: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor] | None = None) -> Tensor:
    """Half the sum of F (theta - theta*)^2 over all numbers of all tensors, in pairs of one shape -> (). importance: F; None = 1.

    Of DTensors it is the sum over all shares, and the gradient of a share is what one process would find.
    """
    totals = []
    for number, (value, anchor) in enumerate(zip(values, anchors, strict=True)):
        away = (value - anchor).square()
        total = (away if importance is None else away * importance[number]).sum()
        totals.append(total.full_tensor() if isinstance(total, DTensor) else total)
    return torch.stack(totals).sum() / 2


class Anchored(Objective):
    """A penalty on the backbone's weights; a part of `Weighted` beside what is learned anew, with its strength among the weights.

    The anchor is the model as training begins, weights that were loaded included. Parameters that do not train, and the heads of
    objectives, are left alone. On every rank the term is one target with the whole penalty, so its mean over the step is the
    penalty however many ranks and pieces there are. Under FSDP2 list it behind the other parts: backward then comes to it
    first, and its gradients, which are shares already, are there before those of the others are added to them.

    Args:
        model: whose parameters are held.
        names: a regular expression that is searched for in the names of parameters ("encoders.text", "mlp"); "" = all of them.
        fisher: weigh every number by its Fisher information, which the callback `headwater.training.Fisher` finds on earlier data
            at the start of a run and which is kept with the objective; False = all alike.
    """

    coupled = True  # one penalty per step, however the batch is cut
    samples: Tensor | None

    def __init__(self, model: Model, names: str = "", fisher: bool = False) -> None:
        super().__init__()
        try:
            self.names = re.compile(names)
        except re.error as error:
            raise ValueError(f"found names {names!r}, which is no regular expression ({error})") from error
        if not any(self.names.search(name) for name, _ in model.named_parameters()):
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ValueError(f"found names {names!r}, which fit no parameter of the model; its first ones are {some}")
        self.anchor = Teacher(model)
        self.importance = Teacher(model) if fisher else None
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64) if fisher else None)

    def init_rules(self) -> dict[str, Rule]:
        return {} if self.samples is None else {"samples": ZERO}

    def held(self, module: nn.Module, like: nn.Module) -> list[Tensor]:
        """The parameters of `module` whose namesakes in `like` are held."""
        pairs = zip(module.parameters(), like.named_parameters(), strict=True)
        return [p for p, (name, own) in pairs if own.requires_grad and self.names.search(name)]

    def start(self, model: Model) -> None:
        self.anchor.copy(model)
        if self.importance is not None and not self.samples:  # else it was carried over from an earlier stage
            for p in self.importance.parameters():
                p.zero_()

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return {"anchored": torch.ones((), dtype=torch.int64, device=batch["seed"].device)}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        if self.importance is not None and batch.get("step") == 0 and not self.samples:
            raise ValueError(
                "found Anchored with fisher before any was estimated; add the callback headwater.training.Fisher with a held-out "
                "source of earlier data, or set fisher: false for a pull that is equal everywhere"
            )
        weights = None if self.importance is None else self.held(self.importance.module, model)
        total = pull(self.held(model, model), self.held(self.anchor.module, model), weights)
        return {"anchored": Term(total, self.numbers(batch)["anchored"])}

    @torch.no_grad()
    def remember(self, model: Model, information: Sequence[Tensor], samples: int, keep: float = 0.0) -> None:
        """The model as it is now becomes the anchor, and F = keep F + information, one tensor per parameter of the model.

        keep: 0 = only what was found now; 1 = a sum over stages (online EWC, Schwarz et al. 2018, arXiv:1805.06370), whose anchor
        is the last start alone.
        """
        if self.importance is None or self.samples is None:
            raise ValueError("found Anchored without fisher, which weighs all parameters alike; set fisher: true")
        for own, found in zip(self.importance.parameters(), information, strict=True):
            own.mul_(keep).add_(found)
        self.anchor.copy(model)
        self.samples.add_(samples)


def squared_gradients(model: Model, objective: Objective, batches: Iterable[Batch], most: int) -> tuple[list[Tensor], int]:
    """Sums over samples of the squared gradient of a sample's own loss, one tensor per parameter of the model; how many samples.

    Every row of a batch is asked alone, and its loss is the mean over its targets of each term. Divided by the number of samples it
    is the diagonal of the empirical Fisher information, the answers being those of the data (Kunstner et al. 2019,
    arXiv:1905.12558, tell how it differs from the one whose answers the model draws).

    most: rows that are asked. ValueError where the loss compares samples, which have none alone then.
    """
    if objective.coupled:
        raise ValueError(f"found {type(objective).__name__}, whose loss compares the samples of a batch; one alone has no gradient")
    parameters = list(model.parameters())
    wanted = [p for p in parameters if p.requires_grad]
    sums, count = {id(p): torch.zeros_like(p) for p in parameters}, 0
    for batch in batches:
        rows = next(t.position.shape[0] for t in batch.values() if isinstance(t, Tokens))
        for row in split_rows(batch, rows)[: most - count]:
            with torch.no_grad():
                task = objective.task(row, objective.look(model, row))
            loss = weighted_sum(objective(model, task), objective.numbers(task), 1)
            for p, g in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True):
                if g is not None:
                    sums[id(p)] += g.detach().square()
            count += 1
        if count >= most:
            break
    return [sums[id(p)] for p in parameters], count
