"""Objectives that make the gradient of a step themselves, from gradients of another one's parts.

It is made before the step and handed over. The step's own pass through the model then needs no graph: it tells values, counts
targets and updates buffers, while its backward pass ends at once. So a step costs one forward pass more than the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headwater import distributed
from headwater.model import Model
from headwater.objectives.objective import Batch, Term
from headwater.objectives.probe import Probe
from headwater.objectives.wrapped import Wrapped

MARK = "handed"  # entry of a batch whose gradient was handed over: the name of a parameter of the model that it reaches


class Handed(Wrapped):
    """Does what `inner` does, by another gradient. It must be the outermost objective: what is outside would get none.

    Args:
        model: handed to the inner objective.
        inner: any objective, a weighted sum too.
    """

    outermost = True

    def gradient(self, probe: Probe, model: Model, batch: Batch) -> list[Tensor]:
        """What the optimizer gets, for every parameter of `probe.theta`: of the model, then of the inner objective."""
        raise NotImplementedError(f"{type(self).__name__} must return a gradient")

    def before_step(self, probe: Probe, batch: Batch) -> Batch:
        if getattr(probe.module, "objective", self) is not self:
            raise ValueError(
                f"found {type(self).__name__} inside of {type(probe.module.objective).__name__}; it makes the gradient of a whole "
                f"step, so put it outside: {type(self).__name__}(inner=...)"
            )
        batch = self.inner.before_step(probe, batch)
        every = Probe(probe.module, nn.ModuleList([probe.learner, self.inner]), probe.call, probe.seed, probe.step, probe.micro)
        made = self.gradient(every, probe.learner, batch)  # type: ignore[arg-type]
        for name, value in every.told.items():
            probe.tell(name, value)
        reached = [(name, p, g) for name, p, g, yes in zip(every.names, every.theta, made, touched(made), strict=True) if yes]
        own = [name.removeprefix("0.") for name, *_ in reached if name.startswith("0.")]
        if not own:
            return batch  # nothing here asks the model, as where no sample has what the parts need
        probe.hand([p for _, p, _ in reached], [g for *_, g in reached], apart=False)
        return {**batch, MARK: own[0]}

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        mark = {MARK: batch[MARK]} if MARK in batch else {}
        return self.inner.task(batch, hints) | mark

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        if MARK not in batch:
            return self.inner(model, batch)
        with torch.no_grad():
            terms = self.inner(model, batch)
        p = model.get_parameter(batch[MARK])  # backward, and DDP, must have something to come to
        nothing = 0 * (p.to_local() if isinstance(p, DTensor) else p).sum()
        return {name: term._replace(total=term.total + nothing) for name, term in terms.items()}


def touched(gradients: list[Tensor]) -> list[bool]:
    """Which are not zero throughout on all ranks. What no loss reaches must not be handed over: optimizers would decay it."""
    counts = torch.stack([distributed.local(g).count_nonzero() for g in gradients])
    return (distributed.total(counts) > 0).tolist()
