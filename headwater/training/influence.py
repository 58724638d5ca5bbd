"""Which samples of a pool are worth training on, judged by what a step on each does for a target set.

Cheap: the inner product, or cosine, of a sample's gradient with the target's, the first-order drop of the target's loss (Han et al.
2023, arXiv:2306.15091, for text that supports in-context learning). True: the drop of the target's loss after one step of the
optimizer on the sample alone. In between: the true drop of a few samples, and a small model that tells it of all others by their
features, anew for every stage of a run (MATES, Yu et al. 2024, arXiv:2406.06046; https://github.com/cxcscmu/MATES).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headwater import distributed, random
from headwater.model import Model
from headwater.objectives.objective import Batch, Objective, count, weighted_sum
from headwater.tokens import Tokens, split_rows
from headwater.training.ghost import Ghost, gradient_of, hidden
from headwater.training.meters import evaluated

Measure = Literal["cosine", "product"]


class Target:
    """What samples shall be good for: the loss of any objective, supervised ones too, on some batches.

    Ranks may hold different batches; loss and gradient are those of all of them.

    Args:
        model, objective: in evaluation mode while they are asked.
        batches: as `Pretrainer.prepare` returns them; what is hidden in them stays the same.
    """

    def __init__(self, model: Model, objective: Objective, batches: Sequence[Batch]) -> None:
        if not batches:
            raise ValueError("found a target without batches; give at least one")
        self.model, self.objective = model, objective
        with evaluated(model), evaluated(objective):
            self.tasks = [hidden(model, objective, batch) for batch in batches]
            self.numbers = count([objective.numbers(task) for task in self.tasks])

    def gradient(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Of the loss by these parameters of the model."""
        with evaluated(self.model), evaluated(self.objective):
            sums = {name: torch.zeros_like(self.model.get_parameter(name)) for name in names}
            for task in self.tasks:
                for name, g in gradient_of(self.model, self.objective, task, self.numbers, names).items():
                    sums[name] += g
        return {name: distributed.total(x) for name, x in sums.items()}

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over all targets of every term, times its weight."""
        with evaluated(self.model), evaluated(self.objective):
            parts = [weighted_sum(self.objective(self.model, task), self.numbers, 1).double() for task in self.tasks]
        return float(distributed.total(torch.stack(parts).sum()))


def aligned(ghost: Ghost, reference: Mapping[str, Tensor], batches: Iterable[Batch], by: Measure = "cosine") -> Tensor:
    """(K,) float64: how every sample's gradient agrees with the target's, in the order of the batches.

    reference: `Target.gradient(ghost.names)`. by: "product" also counts how strongly a sample pulls.
    """
    found = [ghost.align(batch, reference) for batch in batches]
    return torch.cat([one.cosine if by == "cosine" else one.product for one in found])


def oracle(objective: Objective, target: Target, batches: Iterable[Batch], optimizer: torch.optim.Optimizer) -> Tensor:
    """(K,) float64: by how much the target's loss drops after one step of the optimizer on a sample alone, in the order of batches.

    Weights and the optimizer are afterwards what they were. Every rank must be given the same samples.

    Args:
        objective: what is learned from a sample; the mean over its own targets is the loss of the step.
        batches: prepared, a sample per row.
        optimizer: of what trains, with the state and rate of the run.
    """
    model = target.model
    groups = [group["params"] for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group if p.requires_grad]
    kept, state, before = [p.detach().clone() for p in parameters], deepcopy(optimizer.state_dict()), target.loss()
    drops = []
    with evaluated(model), evaluated(objective):
        for row in (row for batch in batches for row in rows_of(batch)):
            task = hidden(model, objective, row)
            loss = weighted_sum(objective(model, task), objective.numbers(task), 1)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, g in zip(parameters, found, strict=True):
                p.grad = g
            optimizer.step()
            drops.append(before - target.loss())
            with torch.no_grad():
                for p, own in zip(parameters, kept, strict=True):
                    p.copy_(own)
            optimizer.load_state_dict(deepcopy(state))
    optimizer.zero_grad()
    return torch.tensor(drops, dtype=torch.float64)


def rows_of(batch: Batch) -> list[Batch]:
    """Every sample of a batch as a batch of its own."""
    tokens = [t for t in batch.values() if isinstance(t, Tokens)]
    if any(t.document is not None for t in tokens):
        raise ValueError("found packed rows; expected a sample per row: leave `pack` out")
    return split_rows(batch, tokens[0].position.shape[0])


@torch.no_grad()
def features(model: Model, batch: Batch) -> Tensor:
    """(S, sum of dims): the pooled vectors of every modality side by side; zeros where a sample lacks it."""
    with evaluated(model):
        parts = {k: t for k, t in batch.items() if isinstance(t, Tokens) and k in model.encoders}
        found = model.represent(parts)
    count = len(batch["seed"])
    return torch.cat([p.x.new_zeros(count, p.x.shape[-1]).index_copy(0, p.sample, p.x) for p in found.values()], 1)


class Ridge(NamedTuple):
    """A line through standardised features. centre, scale, weight: (F,); offset: (); strength: of the penalty."""

    centre: Tensor
    scale: Tensor
    weight: Tensor
    offset: Tensor
    strength: float

    def __call__(self, x: Tensor) -> Tensor:
        """(K, F) -> (K,), float64."""
        return ((x.double() - self.centre) / self.scale) @ self.weight + self.offset


def ridge(x: Tensor, y: Tensor, strengths: Sequence[float] = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)) -> Ridge:
    """Regression of y (K,) on x (K, F) with the penalty under which every sample is best told by the others.

    The errors of leaving one out follow from one decomposition: (y - y^) / (1 - h), h being the diagonal of the hat matrix.
    """
    if len(x) < 3:
        raise ValueError(f"found {len(x)} samples with a known value; expected 3 or more to fit")
    x, y = x.double(), y.double()
    centre, offset = x.mean(0), y.mean()
    scale = x.std(0).clamp(min=1e-6 * x.std(0).max().clamp(min=1e-30))
    u, s, v = torch.linalg.svd((x - centre) / scale, full_matrices=False)
    best: tuple[float, float] | None = None
    for strength in strengths:
        shrunk = s.square() / (s.square() + strength)
        told = u @ (shrunk * (u.mT @ (y - offset)))
        own = u.square() @ shrunk + 1 / len(x)
        error = float((((y - offset) - told) / (1 - own).clamp(min=1e-9)).square().mean())
        best = min(best, (error, strength)) if best else (error, strength)
    assert best is not None
    weight = v.mT @ (s / (s.square() + best[1]) * (u.mT @ (y - offset)))
    return Ridge(centre, scale, weight, offset, best[1])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks of a (K,) and b (K,), equal values having their mean rank."""
    ranks = torch.stack([ranked(a), ranked(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def ranked(x: Tensor) -> Tensor:
    """(K,) -> the rank of each from 0, float64; of equal values the mean of theirs."""
    _, place, many = x.unique(return_inverse=True, return_counts=True)
    return (many.cumsum(0) - (many + 1) / 2).double()[place]


def draw(scores: Tensor, keep: int, temperature: float = 0.0, seed: int = 0) -> Tensor:
    """(keep,) sorted numbers of the samples with the highest score (K,) + temperature * deviation * Gumbel noise.

    This draws without replacement from softmax(score / (temperature * deviation)) (Kool et al. 2019, arXiv:1903.06059), so that
    neighbours of the best do not take all places; 0 = the best themselves. Samples without a finite score are never drawn.
    """
    known = scores.isfinite()
    if not 0 <= keep <= int(known.sum()) or temperature < 0:
        raise ValueError(f"found keep={keep} of {int(known.sum())} samples and temperature={temperature}; expected neither below 0")
    noise = random.gumbel(random.fold(torch.tensor(seed), torch.arange(len(scores))), (), "influence").double()
    values = scores.double() + temperature * scores[known].double().std(correction=0) * noise
    return values.where(known, -torch.inf).argsort(descending=True, stable=True)[:keep].sort().values
