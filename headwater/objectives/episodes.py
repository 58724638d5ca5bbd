"""Some steps are episodes: weights are sought from which a few steps on some samples of a task help with its others.

First-order MAML (Finn et al. 2017, arXiv:1703.03400, section 5.2): the gradient of the query samples, taken where steps on the
support samples have led, is followed from where these began. Beside ordinary pretraining steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from headwater import random
from headwater.model import Model
from headwater.objectives.designers.designer import rows_of
from headwater.objectives.divided import Groups
from headwater.objectives.handed import Handed
from headwater.objectives.objective import Batch, Objective, Schedule, at
from headwater.objectives.probe import Ask, Probe


class Episodes(Handed):
    """Ordinary steps, and now and then an episode. Heads of the objective adapt with the model.

    Which samples are support, and which are query, is drawn by their seeds, half and half.

    Args:
        model: handed to the inner objective.
        inner: any objective that does not compare samples, a weighted sum too.
        share: of the steps that are episodes, drawn by their number; a number or a schedule over the run.
        steps: of plain gradient descent on the support samples.
        rate: of these steps.
        part: of a weighted sum: what episodes are about, while ordinary steps are about the other parts; None = all, in both.
        groups: each group of samples is a task with support and query of its own; None = all samples are one task.
        seed: of the draws.
    """

    def __init__(
        self,
        model: Model,
        inner: Callable[[Model], Objective],
        share: float | Schedule = 0.1,
        steps: int = 3,
        rate: float = 0.01,
        part: str | None = None,
        groups: Groups | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, inner)
        if steps < 1 or rate <= 0 or not (callable(share) or 0 <= share <= 1):
            raise ValueError(f"found share={share}, steps={steps}, rate={rate}; expected a share of 0 to 1, a step or more, a rate")
        if part is not None and (part not in self.parts or len(self.parts) < 2):
            raise ValueError(f"found part {part!r}; expected one of several parts of a Weighted, which are {', '.join(self.parts)}")
        self.share, self.steps, self.rate, self.part, self.groups, self.seed = share, steps, rate, part, groups, seed

    def before_step(self, probe: Probe, batch: Batch) -> Batch:
        draw = random.seed_of(self.seed, batch.get("step", 0)) / (1 << 63)
        episode = draw < at(self.share, batch.get("progress", 0.0))
        probe.tell("episode", float(episode))
        if self.part is not None:
            batch = {**batch, "parts": [name for name in self.parts if (name == self.part) == episode]}
        return super().before_step(probe, batch) if episode else self.inner.before_step(probe, batch)

    def gradient(self, probe: Probe, model: Model, batch: Batch) -> list[Tensor]:
        """The mean over tasks."""
        tasks = [batch] if self.groups is None else list(self.groups.rows(batch).values())
        found = [torch.zeros_like(p) for p in probe.theta]
        for task in tasks:
            chosen = random.uniform(task["seed"], (), "support") < 0.5
            support, query = (self.asked(probe, model, rows_of(task, rows)) for rows in (chosen, ~chosen))
            slopes = adapted(probe, support, query, self.steps, self.rate)
            found = [f + g / len(tasks) for f, g in zip(found, slopes, strict=True)]
        return found

    def asked(self, probe: Probe, model: Model, part: Batch) -> Ask:
        """The whole loss of some samples."""
        with torch.no_grad(), probe.still():
            task = probe.call(lambda: self.inner.task(part, self.inner.look(model, part)))
        probe.let_go()
        return partial(self.inner, model, task)


def adapted(probe: Probe, support: Ask, query: Ask, steps: int, rate: float) -> list[Tensor]:
    """Gradient of the query loss behind some steps down the support loss, for every parameter of `probe.theta`."""
    with probe.nudged([torch.zeros_like(p) for p in probe.theta], 0.0):
        for _ in range(steps):
            probe.move(probe.gradient(support, probe.theta)[1], -rate)
        return probe.gradient(query, probe.theta)[1]
