"""V-Pretraining: a little labelled feedback shapes the task that a learner sets itself, and never trains the learner.

Per step: a designer phi makes the task of a batch; the learner theta descends L_pre(theta; task). Every few steps a small labelled
batch gives g_down = grad L_down(theta), and the value of the task is <g_down, grad_theta L_pre(theta; task_phi)>: the first-order
drop of L_down after one plain gradient step, per unit of learning rate. phi ascends the value; the learner then takes its ordinary
step on the task as it is. After V-Pretraining (Ke et al. 2026, arXiv:2601.22108: soft targets for language, views for pictures);
here for any objective, designer and feedback.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from headwater import distributed, random
from headwater.init import Rule, constant
from headwater.model import Model
from headwater.objectives.designers.designer import Designer
from headwater.objectives.directions import Direction
from headwater.objectives.estimators import Difference, Double, Estimator
from headwater.objectives.objective import Batch, Objective, Term
from headwater.objectives.probe import Ask, Probe
from headwater.objectives.weighted import merged
from headwater.objectives.wrapped import Wrapped
from headwater.tokens import Tokens, split_rows

Control = Literal["random", "still"]
# from exact and dear to rough and cheap: an estimator, and the share of the batch that it sees is 1 / pieces
CANDIDATES: tuple[tuple[Estimator, int], ...] = ((Double(), 1), *((Difference(), pieces) for pieces in (1, 2, 4, 8)))


class VPretraining(Wrapped):
    """Does what `inner` does, with tasks that a designer makes and feedback improves.

    The data module gives `feedback`, a small labelled batch, on every `every`-th step. Its labels reach the designer and, where
    the feedback objective has parameters of its own, its head; no gradient of it reaches the model. Give the designer its own
    learning rate by a rule of `groups`, such as {pattern: "^objective\\\\.designer", factor: 100, weight_decay: 0}; designer and
    head are clipped apart from the learner.

    Args:
        model: the learner.
        inner: what is learned, any objective.
        feedback: what shall become better, any objective with labels: Probed, Supervised, Causal on answers, Contrastive, ...
        designer: made of the model and the inner objective. None = the task stays as it is, and values are only logged.
        estimator: of the value's gradient; None = Difference().
        every: steps between batches of feedback.
        after: steps before the designer begins to move, so that gradients of the feedback mean something.
        where: regular expression; only the learner's parameters whose names match have a part in the value, for example the last
            blocks. None = all.
        pieces: the value is taken on one piece of so many of the batch, each in turn.
        budget: share of the time of a plain step that V-Pretraining may add, on average over steps. The most exact estimator and
            number of pieces that keep it are chosen by a measurement when the designer begins, and printed; `estimator` and
            `pieces` are then not used. None = no measurement.
        against: True = the direction is g_down minus the same with shuffled labels: what any labels would ask for is left out.
        control: an honest control run. "random": phi moves by noise of the size of its gradient; "still": the designer stays as
            it starts. A third control, feedback with shuffled labels, is `shuffled` of the data's feedback.
        labels: keys of the feedback that `against` shuffles; None = the labels that the feedback objective reads.
        direction: what becomes of g_down before the value is taken along it, such as Neumann; None = it stays.
    """

    def __init__(
        self,
        model: Model,
        inner: Callable[[Model], Objective],
        feedback: Callable[[Model], Objective],
        designer: Callable[[Model, Objective], Designer] | None = None,
        estimator: Estimator | None = None,
        every: int = 1,
        after: int = 50,
        where: str | None = None,
        pieces: int = 1,
        budget: float | None = None,
        against: bool = False,
        control: Control | None = None,
        labels: list[str] | None = None,
        direction: Direction | None = None,
    ) -> None:
        super().__init__(model, inner)
        if every < 1 or after < 0 or pieces < 1 or (budget is not None and budget <= 0):
            raise ValueError(
                f"found every={every}, after={after}, pieces={pieces}, budget={budget}; expected every and pieces of 1 or more, "
                "after of 0 or more, and a budget above 0"
            )
        self.feedback = feedback(model)
        self.designer = designer(model, self.inner) if designer else Designer()
        self.estimator, self.piece_count, self.budget = estimator or Difference(), pieces, budget
        self.every, self.after, self.where, self.against = every, after, where, against
        self.control, self.direction = control, direction
        self.feedback_needs = self.feedback.needs
        self.readers = merged({"inner": self.inner.readers, "feedback": self.feedback.readers, "designer": self.designer.readers})
        self.views = merged({"inner": self.inner.views, "feedback": self.feedback.views})
        self.needs = tuple(dict.fromkeys((*self.inner.needs, *self.designer.needs)))
        self.labels = tuple(labels or self.feedback.readers)
        if against and not self.labels:
            raise ValueError(f"{type(self.feedback).__name__} reads no labels that could be shuffled; name keys in `labels`")
        self.chosen: Tensor
        self.register_buffer("chosen", torch.tensor(-1))  # which candidate the budget allows; part of the checkpoint

    def init_rules(self) -> dict[str, Rule]:
        return {"chosen": constant(-1)}

    def start(self, model: Model) -> None:
        self.inner.start(model)
        self.feedback.start(model)

    def before_step(self, probe: Probe, batch: Batch) -> Batch:
        """Take the feedback out of the batch, and make of it gradients for the designer and the head."""
        found = {name: value for name, value in batch.items() if name != "feedback"}
        if "feedback" not in batch:
            return self.inner.before_step(probe, found)
        probe.among(self.where)
        model: Any = probe.learner
        step, run = batch["step"], {name: batch[name] for name in ("progress", "step")}
        feedback = {**batch["feedback"], **run}
        moves = step >= self.after and self.control != "still" and any(True for _ in self.designer.parameters())
        if moves and self.budget is not None and self.chosen < 0:
            self._choose(probe, model, found, feedback, self.budget)
        direction = self._direction(probe, model, feedback)
        probe.watch(direction)
        if moves:
            chosen = None if self.budget is None else int(self.chosen)
            estimator, pieces = (self.estimator, self.piece_count) if chosen is None else CANDIDATES[chosen]
            part = piece(found, pieces, step // self.every)
            if self.direction is not None:
                direction = self.direction(probe, self._ask(probe, model, part), direction)
            self._improve(probe, model, part, direction, estimator)
        for name, value in self.designer.tell().items():
            probe.tell(f"designer/{name}", value)
        return self.inner.before_step(probe, found)

    def _direction(self, probe: Probe, model: Model, feedback: Batch) -> list[Tensor]:
        """g_down. The feedback's own parameters get their gradient at the same time."""
        head = [p for p in self.feedback.parameters() if p.requires_grad]
        loss, found = probe.gradient(self._feedback(model, feedback), [*probe.theta, *head])
        direction, slopes = found[: len(probe.theta)], found[len(probe.theta) :]
        if head:
            probe.hand(head, slopes)
        probe.tell("feedback", loss)
        if self.against:
            _, other = probe.gradient(self._feedback(model, shuffled(feedback, self.labels)), probe.theta)
            direction = [a - b for a, b in zip(direction, other, strict=True)]
        return direction

    def _feedback(self, model: Model, feedback: Batch) -> Ask:
        def ask() -> dict[str, Term]:
            with torch.no_grad():
                task = self.feedback.task(feedback, self.feedback.look(model, feedback))
            return self.feedback(model, task)

        return ask

    def _ask(self, probe: Probe, model: Model, part: Batch) -> Ask:
        """The loss of the task that the designer would set, with a graph to its parameters. What it looks at stays the same."""
        with torch.no_grad(), probe.still():
            hints = probe.call(lambda: self.designer.look(self.inner, model, part, True))
        probe.let_go()

        def ask() -> dict[str, Term]:
            return self.designer.ask(self.inner, model, self.designer.design(self.inner, part, hints, True))

        return ask

    def _improve(self, probe: Probe, model: Model, part: Batch, direction: list[Tensor], estimator: Estimator) -> None:
        """Hand the value's gradient over, for the optimizer to ascend."""
        phi = [p for p in self.designer.parameters() if p.requires_grad]
        _, slopes = estimator(probe, self._ask(probe, model, part), direction, phi)
        if self.control == "random":
            slopes = noise_like(probe, slopes, random.seed_of(probe.seed, 1))
        probe.hand(phi, [-g for g in slopes])

    def _choose(self, probe: Probe, model: Model, batch: Batch, feedback: Batch, budget: float) -> None:
        """The first candidate within the budget, or the last one; all ranks follow the clock of the first."""
        phi = [p for p in self.designer.parameters() if p.requires_grad]
        plain = spent(lambda: probe.gradient(self._ask(probe, model, batch), probe.theta), probe)
        down = spent(lambda: probe.gradient(self._feedback(model, feedback), probe.theta), probe)
        direction = probe.gradient(self._feedback(model, feedback), probe.theta)[1]
        for number, (estimator, pieces) in enumerate(CANDIDATES):
            if probe.shared and isinstance(estimator, Double):
                continue
            asked = partial(self._ask, probe, model, piece(batch, pieces, 0))
            look = spent(lambda e=estimator, a=asked: e(probe, a(), direction, phi), probe)  # type: ignore[misc]
            cost = (down + look) / self.every / plain
            said = f"{type(estimator).__name__} on 1/{pieces} of the batch"
            rank_zero_info(f"V-Pretraining by {said} every {self.every} steps adds {cost:.0%} to a plain step")
            self.chosen.fill_(number)
            if cost <= budget:
                return
        rank_zero_warn(f"no estimator keeps the budget of {budget:.0%}; raise `every`, or make the batch of feedback smaller")

    def look(self, model: Model, batch: Batch) -> Any:
        return self.designer.look(self.inner, model, batch, False)

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        return self.designer.design(self.inner, batch, hints, False)

    def numbers(self, batch: Batch) -> dict[str, Tensor]:
        return self.designer.numbers(self.inner, batch)

    def forward(self, model: Model, batch: Batch) -> dict[str, Term]:
        return self.designer.ask(self.inner, model, batch)

    def after_step(self, model: Model, progress: float) -> None:
        self.inner.after_step(model, progress)
        self.feedback.after_step(model, progress)


def piece(batch: Batch, pieces: int, turn: int) -> Batch:
    """One piece of a batch, each in its turn; where a rank has fewer rows than pieces, one of its rows."""
    rows = next(t.position.shape[0] for t in batch.values() if isinstance(t, Tokens))
    found = split_rows(batch, min(pieces, rows))
    return found[turn % len(found)]


def shuffled(batch: Batch, labels: tuple[str, ...]) -> Batch:
    """Each sample with the labels of another one: rows of these keys move by half of their number."""
    if any(isinstance(t, Tokens) and t.document is not None for t in batch.values()):
        raise ValueError("found packed feedback, whose labels cannot be shuffled by rows; leave data.pack out for it")
    moved = {name: batch[name].map(lambda field: field.roll(max(1, len(field) // 2), 0)) for name in labels}
    return {**batch, **moved}


def noise_like(probe: Probe, slopes: list[Tensor], seed: int) -> list[Tensor]:
    """A random direction of the same length."""
    made = torch.Generator().manual_seed(seed)
    noise = [torch.zeros_like(g) for g in slopes]
    for n in map(distributed.local, noise):
        n.copy_(torch.randn(n.shape, generator=made))
    factor = float(probe.norm(slopes) / probe.norm(noise).clamp(min=1e-30))
    return [n * factor for n in noise]


def spent(work: Callable[[], Any], probe: Probe) -> float:
    """Seconds on the first rank: the second of two runs."""
    for _ in range(2):
        if probe.theta[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if probe.theta[0].is_cuda:
            torch.cuda.synchronize()
    told = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=probe.theta[0].device)
    return float(distributed.gather(told)[0][0])
