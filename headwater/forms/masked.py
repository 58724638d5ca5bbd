"""Weights of which only some entries are there: static random sparsity, pruning by magnitude, N of every M."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from headwater import random
from headwater.forms.form import BLOCKS, Form, Full, Schedule, at, gathered, shared
from headwater.init import ONE, ZERO, Rule

By = Literal["random", "magnitude"]


def largest(scores: Tensor, kept: int) -> Tensor:
    """True at the `kept` largest of (..., K) scores, exactly so many along the last dimension; ties go to one of them."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(kept, -1).indices, True)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """True at the n largest of every m neighbours in a row: (out, in) -> (out, in) (Mishra et al. 2021, arXiv:2104.08378)."""
    return largest(scores.unflatten(-1, (-1, m)), n).flatten(-2)


def drawn(shape: torch.Size, seed: int, name: str) -> Tensor:
    """Scores that belong to the places of a matrix, in [0, 1)."""
    return random.uniform(torch.tensor(seed, device="cpu"), shape, name)


class Pruned(Full):
    """weight = full * mask, (out, in) both. sparsity: share of the entries that the mask leaves out, as it was set last."""

    mask: Tensor
    sparsity: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool))
        self.register_buffer("sparsity", linear.weight.new_zeros((), dtype=torch.float32))

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        """Nothing is left out before the first step of a run."""
        return super().weight_rules(rule) | {"mask": ONE, "sparsity": ZERO}

    @property
    def weight(self) -> Tensor:
        return self.full * self.mask

    @torch.no_grad()
    def clean(self) -> None:
        """Zero where the mask is: then it can be taken away without a change. Under FSDP2 every rank its own share."""
        self.full.mul_(shared(self.mask, self.full))


class Masked(Form):
    """Sparse weights in full storage: what is masked is zero, has no gradient, and comes back as zero when the mask goes.

    A number is a static sparsity. A schedule may rise, which is pruning by degrees (Zhu and Gupta 2017, arXiv:1710.01878), or end
    at 0: sparse pretraining and dense fine-tuning in one run (SPDF, Thangarasa et al. 2023, arXiv:2303.10464). Masks are set before
    the first step. Merges. For the memory of the entries alone see SparseLowRank with `rank: 0`.

    Args:
        match, seed: as in Form.
        sparsity: share of the entries that are zero; exactly that of the whole numbers that are nearest.
        by: "random", the same share of every layer, which SPDF has; "magnitude": the smallest of all these layers together.
        pattern: (n, m): n of every m neighbours in a row stay, whenever the sparsity is above 0; (2, 4) is what the sparse
            tensor cores of NVIDIA's cards take. None = any entries.
    """

    layer = Pruned

    def __init__(
        self,
        match: str = BLOCKS,
        sparsity: float | Schedule = 0.75,
        by: By = "random",
        pattern: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(match, seed)
        if not callable(sparsity) and not 0 <= sparsity < 1:
            raise ValueError(f"found sparsity {sparsity}; expected a share from 0 to below 1")
        if pattern is not None and not 0 < pattern[0] < pattern[1]:
            raise ValueError(f"found the pattern {pattern}; expected (n, m) with n of every m entries kept, such as (2, 4)")
        self.sparsity, self.by, self.pattern = sparsity, by, None if pattern is None else tuple(pattern)
        self.settle("sparsity", sparsity)

    def make(self, linear: nn.Linear, name: str) -> nn.Module:
        if self.pattern is not None and linear.in_features % self.pattern[1]:
            raise ValueError(f"found {linear.in_features} inputs of {name}; expected a multiple of {self.pattern[1]}")
        return Pruned(linear)

    def __call__(self, model: nn.Module) -> None:
        super().__call__(model)
        if not any(layer.full.is_meta for _, layer in self.layers(model)):
            self.at(model, 0.0)

    def at(self, model: nn.Module, progress: float) -> None:
        """New masks where the sparsity has changed, on all ranks alike; zeros where they are, whatever the optimizer did."""
        layers, sparsity = self.layers(model), at(self.sparsity, progress)
        for _, layer in layers:
            layer.clean()
        held = layers[0][1].sparsity
        if float(held) != float(held.new_tensor(sparsity)):  # in its own precision
            for (_, layer), mask in zip(layers, self.masks(layers, sparsity), strict=True):
                layer.mask.copy_(mask)
                layer.sparsity.fill_(sparsity)
                layer.clean()

    @torch.no_grad()
    def masks(self, layers: list[tuple[str, Pruned]], sparsity: float) -> list[Tensor]:
        """One per layer, (out, in) bool."""
        if not sparsity:
            return [torch.ones_like(layer.mask) for _, layer in layers]
        scores = [self.score(name, layer) for name, layer in layers]
        if self.pattern is not None:
            return [n_of_m(score, *self.pattern) for score in scores]
        if self.by == "random":
            return [largest(s.flatten(), round((1 - sparsity) * s.numel())).view_as(s) for s in scores]
        every = torch.cat([score.flatten() for score in scores])
        kept = largest(every, round((1 - sparsity) * len(every))).split([score.numel() for score in scores])
        return [mask.view_as(score) for mask, score in zip(kept, scores, strict=True)]

    def score(self, name: str, layer: Pruned) -> Tensor:
        """What decides which entries stay, (out, in), the same on all ranks."""
        if self.by == "random":
            return drawn(layer.mask.shape, self.seed, name)
        return gathered(layer.full).detach().abs()
