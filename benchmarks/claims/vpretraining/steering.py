"""What the claims about V-Pretraining share: arms that differ in the designer alone, run by the real trainer on real shards."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from headwater import init
from headwater.datamodules.datamodule import ShardDataModule
from headwater.datamodules.feedback import Feedback
from headwater.datamodules.sources import Source
from headwater.model import Model
from headwater.objectives import Objective, VPretraining
from headwater.objectives.designers import Designer
from headwater.objectives.objective import Schedule
from headwater.pretrainer import Pretrainer
from headwater.training.groups import Groups, Rule

Make = Callable[[Model], Objective]
CONTROLS = ("plain", "plain, as long", "random designer", "shuffled feedback")


class Steering(NamedTuple):
    """What feedback may change. designer: of the task; feedback: the loss that shall fall; rate: the designer's learning rate, as
    a factor on the learner's; options: further arguments of VPretraining."""

    designer: Callable[[Model, Objective], Designer]
    feedback: Make
    rate: float
    options: Mapping[str, Any] = {}


def trained(
    model: Model,
    objective: Make,
    train: Mapping[str, Source],
    steps: int,
    seed: int,
    rate: float,
    feedback: Feedback | None = None,
    designed: float | None = None,
    schedule: Schedule | None = None,
    scheme: init.Normal | None = None,
    batch_size: int = 64,
    unit: Any = "sample",
) -> tuple[Pretrainer, float]:
    """Train in place, as `headwater fit` does; returns what was trained, and seconds. designed: factor on the designer's rate."""
    adamw = partial(torch.optim.AdamW, lr=rate, weight_decay=0.05, betas=(0.9, 0.95))
    rules = [Rule("^objective\\.designer", factor=designed, weight_decay=0.0)] if designed else []
    pretrainer = Pretrainer(model, objective, adamw, schedule, seed=seed, init=scheme, groups=Groups(rules=rules))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ShardDataModule(
            train=dict(train), feedback=feedback, batch_size=batch_size, unit=unit, workers=0, notice=1, seed=seed
        )
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, use_distributed_sampler=False, **quiet)
        start = time.process_time()
        trainer.fit(pretrainer, data)
    pretrainer.eval()
    return pretrainer, time.process_time() - start


def arms(
    fresh: Callable[[], Model],
    inner: Make,
    steering: Steering,
    data: Mapping[str, Source],
    given: Feedback,
    wrong: Feedback,
    judge: Callable[[Model], Mapping[str, float]],
    steps: int,
    seed: int,
    rate: float,
    plain: Make | None = None,
    **run: Any,
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """Arm -> figures of the judge; and what the designer of V-Pretraining wants in the end.

    fresh: the learner, always with the same weights. given: the feedback; wrong: the same with shuffled labels. "plain, as long"
    learns for as many steps as fit into the processor time that V-Pretraining took. plain: what both of them learn, where it is not
    `inner`.
    """

    def go(objective: Make, steps: int = steps, feedback: Feedback | None = None) -> tuple[Pretrainer, float]:
        designed = steering.rate if feedback else None
        return trained(fresh(), objective, data, steps, seed, rate, feedback, designed, **run)

    def with_feedback(**options: Any) -> Make:
        return partial(
            VPretraining, inner=inner, feedback=steering.feedback, designer=steering.designer, **{**steering.options, **options}
        )

    first, seconds = go(plain or inner)
    ours, longer = go(with_feedback(), feedback=given)
    noise, _ = go(with_feedback(control="random"), feedback=given)
    lost, _ = go(with_feedback(), feedback=wrong)
    long, _ = go(plain or inner, round(steps * longer / seconds))
    found = {"plain": first, "plain, as long": long, "random designer": noise, "shuffled feedback": lost, "V-Pretraining": ours}
    wants = {name: [round(float(x), 3) for x in torch.atleast_1d(value)] for name, value in ours.objective.designer.tell().items()}  # type: ignore[operator]
    figures = {name: dict(judge(p.backbone)) for name, p in found.items()}
    return figures, {**wants, "time": [round(longer / seconds, 2)]}
