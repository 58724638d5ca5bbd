"""Restarts of low-rank weights: additions merge and begin again, factors are balanced, and the optimizer forgets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn

from headwater import random
from headwater.objectives.objective import Curve, Schedule


class Restarts(pl.Callback):
    """Before some steps, everything in the backbone that has a `restart` does it, and the optimizer forgets what has changed.

    LoRA: the addition merges into the weight and another one begins, so that many of them make a matrix of any rank (ReLoRA,
    Lialin et al. 2023, arXiv:2307.05695; https://github.com/Guitaricet/relora). LowRank: factors of the same product with equal
    norms (Glentis et al. 2025, arXiv:2505.22922). Ternary: nothing but that the optimizer forgets. `Jagged` is the schedule that
    goes with it.

    Args:
        every: steps between restarts; 0 = none but those of `at`.
        at: further steps with one.
    """

    def __init__(self, every: int = 0, at: Sequence[int] = ()) -> None:
        if every < 0 or (not every and not at):
            raise ValueError(f"found every={every} and at={list(at)}; expected steps between restarts, or the steps with one")
        self.every, self.steps = every, frozenset(at)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not any(hasattr(module, "restart") for module in pl_module.backbone.modules()):
            raise ValueError("found nothing to restart; add LoRA, LowRank or Ternary to backbone.forms, or leave Restarts out")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step and ((self.every and step % self.every == 0) or step in self.steps):
            restart(pl_module.backbone, trainer.optimizers[0], random.seed_of(pl_module.seed, step))


def restart(model: nn.Module, optimizer: Any, seed: int) -> None:
    """Now, in all layers that can. Under FSDP2 on all ranks."""
    for name, module in model.named_modules():
        if hasattr(module, "restart"):
            for p in module.restart(seed, name):
                optimizer.state.pop(p, None)


class Jagged(Curve):
    """`inner`, and at its begin and after each of the restarts a linear rise from 0: the rate that goes with Restarts.

    Args:
        inner: the schedule between the rises.
        cycles: the run has so many equal parts.
        warmup: share of a part in which the rate rises.
    """

    def __init__(self, inner: Schedule, cycles: int, warmup: float = 0.1) -> None:
        if cycles < 1 or not 0 < warmup <= 1:
            raise ValueError(f"found {cycles} cycles and warmup {warmup}; expected 1 or more, and a share above 0 and up to 1")
        self.inner, self.cycles, self.warmup = inner, cycles, warmup

    def __call__(self, progress: float) -> float:
        within = progress * self.cycles % 1 if progress < 1 else 1.0
        return self.inner(progress) * min(1.0, within / self.warmup)
