"""Samples whose modalities disagree are left out: what one pair asks of a shared encoder, another must not ask to undo.

Wu et al. 2022 (arXiv:2211.02077): where parts of a sample do not belong together, its losses pull at the encoder that they share in
different ways. How much disagreement is borne falls over the run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwater.model import Model
from headwater.objectives.divided import by_term
from headwater.objectives.objective import Batch, Objective, Schedule, at, count, weighted_sum
from headwater.objectives.probe import Probe
from headwater.objectives.weighted import narrowed
from headwater.objectives.wrapped import Wrapped
from headwater.tokens import Tokens


def agreement(gradients: list[Tensor]) -> Tensor:
    """K gradients of every sample (S, D) -> the lowest cosine between two of them, (S,).

    1 where fewer than two are not zero, which have nothing to disagree about.
    """
    pairs = [
        torch.where((a != 0).any(-1) & (b != 0).any(-1), F.cosine_similarity(a, b, -1), 1.0) for a, b in combinations(gradients, 2)
    ]
    return torch.stack(pairs).amin(0) if pairs else gradients[0].new_ones(len(gradients[0]))


class Agreeing(Wrapped):
    """Leaves out of a step the samples whose terms disagree about one encoder.

    Compared are the gradients of the terms, or of the parts of a weighted sum, by what the encoder returns of a sample, summed
    over its tokens. That takes a forward pass of the whole batch and, for every term, a backward pass through what lies behind
    the encoder. Means of the lowest cosines and of the share of samples that stay are logged as train/agreement and train/kept.

    Args:
        model: handed to the inner objective.
        inner: an objective of several terms that share an encoder, such as Contrastive with pairs, or a `Weighted`.
        modality: of the encoder.
        threshold: samples whose lowest cosine is under it are left out; a number or a schedule over the run. With -1 all stay.
    """

    def __init__(self, model: Model, inner: Callable[[Model], Objective], modality: str, threshold: float | Schedule = 0.0) -> None:
        super().__init__(model, inner)
        model.encoder(modality)  # which it must have
        self.modality, self.threshold = modality, threshold

    def before_step(self, probe: Probe, batch: Batch) -> Batch:
        batch = self.inner.before_step(probe, batch)
        found = agreement(self.pulls(probe, probe.learner, batch))
        kept = found >= at(self.threshold, batch.get("progress", 0.0))
        probe.tell("agreement", found.mean())
        probe.tell("kept", kept.double().mean())
        return narrowed(batch, kept)

    def pulls(self, probe: Probe, model: Any, batch: Batch) -> list[Tensor]:
        """The gradient of every term, (S, D) float64 for the samples of this rank."""
        returned: list[Tokens] = []
        chunks, model.chunks = model.chunks, 1  # pieces that are computed again would not be there to ask
        hook = model.encoder(self.modality).register_forward_hook(lambda *call: returned.append(call[-1]))
        try:
            with probe.still():
                with torch.no_grad():
                    task = probe.call(lambda: self.inner.task(batch, self.inner.look(model, batch)))
                returned.clear()
                probe.let_go()
                with torch.enable_grad():
                    terms = probe.call(lambda: self.inner(model, task))
                if not returned:
                    raise ValueError(
                        f"{type(self.inner).__name__} does not ask the encoder of {self.modality}; name one that it asks"
                    )
                numbers = count([self.inner.numbers(task)])
                parts = [{name: terms[name] for name in part.terms} for part in by_term(self.inner, task).values()]
                return [by_sample(weighted_sum(part, numbers, 1), returned, len(batch["seed"])) for part in parts]
        finally:
            hook.remove()
            model.chunks = chunks
            probe.let_go()


def by_sample(loss: Tensor, returned: list[Tokens], number: int) -> Tensor:
    """Gradient of a loss by all tokens of a sample alike, (S, D) float64. number: S; views stand in blocks of S rows."""
    total = torch.zeros(number, returned[0].x.shape[-1], dtype=torch.float64, device=returned[0].x.device)
    if not loss.requires_grad:
        return total
    found = torch.autograd.grad(loss, [t.x for t in returned], retain_graph=True, allow_unused=True)
    for t, g in zip(returned, found, strict=True):
        if g is not None:
            total.index_add_(0, t.sample().flatten() % number, g.flatten(0, 1).double())
    return total
