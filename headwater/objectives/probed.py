"""How well a linear probe reads labels from features that it was not fitted on: feedback without a head to train.

The labelled samples are dealt to folds. For each, a ridge regression is fitted in closed form to the features of the others, and
scores the fold. Scored on the samples that it was fitted to, a probe with many features has learned their noise, and so does
whoever follows its gradient; across folds the loss is that of a probe on new samples (cross-fitting: Chernozhukov et al. 2018,
arXiv:1608.00060). Ridge regression as the head of a network that learns from few samples, with gradient through the fit, is
Bertinetto et al. 2019 (arXiv:1805.08136).

The score is the squared error, also of classes: the fit is the best one by the same measure, so nothing has to be tuned between
the two as the temperature of a cross entropy would, and it serves classes, tags and numbers alike.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import distributed, random
from headwater.model import Model, Reader
from headwater.objectives.label_losses import known_mean
from headwater.objectives.labelled import Labelled
from headwater.objectives.objective import Batch, Term, part

FLAT = 1e-12  # share of the mean square up to which a variance is rounding


class Fit(NamedTuple):
    """One regression per fold, fitted to the others: what fold f is asked with, answer = x @ weight[f] + bias[f].

    weight: (F, D, C). bias: (F, C). variance: (C,) of the targets of all folds.
    """

    weight: Tensor
    bias: Tensor
    variance: Tensor


def fit(x: Tensor, y: Tensor, weight: Tensor, fold: Tensor, folds: int, ridge: float) -> Fit:
    """Ridge regressions on the targets of all ranks, from one sum of products.

    x: (K, D). y: (K, C), NaN where a number is missing, in place of which the mean is taken. weight: (K,). fold: (K,) from 0 to
    folds - 1, or -1 for none. Of centred targets Y and features Z, which are divided by their spread over all folds and left out
    where they do not vary, each solves (Z'Z / n + ridge I) W = Z'Y / n.
    """
    known, sizes = ~y.isnan(), [1, x.shape[1], y.shape[1], y.shape[1]]
    joint = torch.cat([x.new_ones(len(x), 1), x, y.nan_to_num(), known.to(x.dtype)], 1)  # (K, P) with P = 1 + D + 2 C
    parts = [(joint[fold == k], weight[fold == k, None]) for k in range(folds)]
    own = distributed.summed(torch.stack([(share * part).mT @ part for part, share in parts]))  # (F, P, P)
    products = torch.stack([own[torch.arange(folds) != k].sum(0) for k in range(folds)])
    (count, of_x, of_y, there), (_, xx, xy, x_there), (_, _, yy, _), _ = (rows.split(sizes, 2) for rows in products.split(sizes, 1))
    n, there = (torch.where(number > 0, number, 1) for number in (count, there))
    mean, offset = of_x / n, of_y / there
    spread, cross = xx / n - mean.mT * mean, (xy - x_there * offset) / n
    scale = _power(_variance(xx, of_x, n), -0.5)[:, None]  # (D, 1)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    slope = scale * torch.linalg.solve(scale * spread * scale.mT + ridge * eye, scale * cross)
    return Fit(slope, (offset - mean @ slope)[:, 0], _variance(yy, of_y, there))


def _variance(products: Tensor, sums: Tensor, number: Tensor) -> Tensor:
    """(F, D, D), (F, 1, D), (F, 1, 1 or D) of all folds but one each -> (D,) variances over all, 0 where they are but rounding."""
    number = number.sum(0)[0]  # every target is in all of them but one, so ratios of sums are those of all targets
    square = products.sum(0).diagonal() / number
    variance = square - (sums.sum(0)[0] / number).square()
    return torch.where(variance > FLAT * square, variance, 0)


def _power(variance: Tensor, exponent: float) -> Tensor:
    """Of each, but 0 where it is 0: what does not vary tells nothing."""
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1) ** exponent, 0)


def deal(number: Tensor, key: Tensor, draw: Tensor, folds: int) -> Tensor:
    """(S,) fold of each sample, the same on whichever rank it lies; -1 without a label, and for all if only one has one.

    Samples in the order of their keys go to the folds in turn, so that all folds have their share of every key, and what comes
    twice goes to one fold. number: (S,) names samples. key: (S,) class of the label, NaN = none. draw: (S,) decides among equals.
    """
    every, first = distributed.gather(torch.stack([number.double(), key, draw.double()], 1))
    labelled = ~every[:, 1].isnan()
    found, owner = every[labelled, 0].unique(return_inverse=True)
    least = every.new_full((len(found), 2), torch.inf)
    least = least.scatter_reduce(0, owner[:, None].expand(-1, 2), every[labelled, 1:], "amin")
    order = least[:, 1].argsort(stable=True)
    order = order[least[order, 0].argsort(stable=True)]
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order), device=order.device) % folds
    fold = torch.full_like(labelled, -1, dtype=torch.int64)
    if len(found) > 1:
        fold[labelled] = turn[owner]
    return fold[first : first + len(number)]


class Probed(Labelled):
    """The error of a linear probe that is fitted in closed form to some of the labelled samples and asked about the others.

    The loss is the squared error over the variance of the targets: 1 = the probe knows no more than their mean. It has no
    parameters, so nothing has to be trained before it tells something. Which samples share a fold changes from batch to batch;
    every class of samples is spread over all folds. With fewer than two labelled samples there is nothing to score.

    Args:
        model: read for widths.
        label: how labels are read, such as Category, Categories, Numbers or PatchClasses.
        modality, unit, context, name, weight: as in Supervised.
        folds: into which the samples are dealt; each is scored by a probe that was fitted to all others.
        ridge: what is added to the diagonal of the correlations of features: with more of it a probe trusts what it saw less.
        through: the gradient tells too how fits change with the features they are made of, and is that of the loss. Else fits are
            constants, like heads that are trained beside: then features are also pulled to where these fits are well calibrated,
            which fits to shuffled labels ask for as much.
    """

    coupled = True

    def __init__(
        self,
        model: Model,
        label: Reader,
        modality: str = "image",
        unit: Literal["sample", "token"] = "sample",
        context: list[str] | None = None,
        name: str = "label",
        weight: Reader | None = None,
        folds: int = 4,
        ridge: float = 1.0,
        through: bool = True,
    ) -> None:
        super().__init__(model, label, modality, unit, context, name, weight)
        if folds < 2 or not ridge > 0:
            raise ValueError(
                f"found folds={folds} and ridge={ridge}; expected 2 folds or more, so that none is scored by a probe that saw it, "
                "and a ridge above 0, without which few samples determine no regression"
            )
        self.folds, self.ridge, self.through, self.vocab = folds, ridge, through, label.vocab

    def task(self, batch: Batch, hints: None = None) -> Batch:
        """Adds "about" (B, L), see Labelled, and "fold" (S,), see `deal`."""
        batch = super().task(batch)
        label, asked = batch[self.name], batch["about"] >= 0
        sample, grouped = label.sample()[asked], self.vocab is not None and self.unit == "sample"
        value = label.x[asked].double() if grouped else torch.zeros_like(sample, dtype=torch.float64)
        none = value.new_full((len(batch["sample"]),), torch.nan)
        key = none.scatter_reduce(0, sample, value, "amin", include_self=False)
        return {**batch, "fold": deal(batch["sample"], key, random.uniform(batch["seed"], (), "fold"), self.folds)}

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        scored = (batch["fold"] >= 0)[batch[self.name].sample()]
        return {"probed": (scored & (batch["about"] >= 0)).sum()}

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        label, asked = batch[self.name], batch["about"] >= 0
        sample, fold = label.sample()[asked], batch["fold"][label.sample()[asked]]
        x = self.features(model, batch)[batch["about"][asked]]
        wide, weight = x.double(), self.weights(batch)[sample].double()
        target = label.x[asked].double() if self.vocab is None else F.one_hot(label.x[asked], self.vocab).double()
        found = fit(wide if self.through else wide.detach(), target, weight, fold, self.folds, self.ridge)
        precision = _power(found.variance if self.vocab is None else found.variance.mean(), -1)  # classes count as one
        total, right = wide.new_zeros(()), []
        for k in range(self.folds):
            mine = fold == k
            answer, truth = wide[mine] @ found.weight[k] + found.bias[k], target[mine]
            error = (answer - torch.where(truth.isnan(), answer.detach(), truth)).square() * precision
            total = total + (known_mean(error, truth) * weight[mine]).sum()
            right.append(answer.argmax(1) == truth.argmax(1))
        number = (fold >= 0).sum()
        metrics = {"accuracy": torch.cat(right).double().mean()} if self.vocab and number else {}
        return {"probed": Term(total.to(torch.promote_types(x.dtype, torch.float32)), number, metrics=metrics)}

    def features(self, model: Model, batch: Batch, told: Tensor | None = None) -> Tensor:
        """(M, D) as in Labelled; those of samples piece by piece, to save memory."""
        if self.unit == "token":
            return super().features(model, batch, told)
        found = model.in_pieces(lambda parts: {self.modality: self.pooled(model, parts, told)}, part(batch, self.asked))
        return found[self.modality].x
