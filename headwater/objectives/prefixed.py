"""Prefix language models of any modality: the beginning of a sample is known and sees itself in both directions.

For texts behind pictures this is SimVLM's objective (Wang et al. 2021, arXiv:2108.10904), for the patches of a picture that of AIM
(El-Nouby et al. 2024, arXiv:2401.08541; https://github.com/apple/ml-aim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headwater import random
from headwater.model import Model
from headwater.objectives.causal import Causal
from headwater.objectives.masks.policies import lengths
from headwater.objectives.objective import Batch
from headwater.objectives.wrapped import Wrapped
from headwater.sequence import orders


class Prefixed(Wrapped):
    """Shows the beginning of each sample, and asks for the rest step by step.

    Args:
        model: handed to the inner objective.
        inner: Causal, or what grew from it.
        known: shares of a sample between which that of its beginning is drawn; at least one token is asked for.
    """

    inner: Causal

    def __init__(self, model: Model, inner: Callable[[Model], Causal] = Causal, known: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(model, inner)
        if not isinstance(self.inner, Causal):
            raise ValueError(f"found {type(self.inner).__name__} inside; expected Causal, or what grew from it")
        if not 0 <= known[0] <= known[1] <= 1:
            raise ValueError(f"found known {known}; expected two shares from 0 to 1, the smaller one first")
        self.known = known

    def task(self, batch: Batch, hints: Any = None) -> Batch:
        task, (low, high) = self.inner.task(batch, hints), self.known
        t, seed = task[self.inner.modality], batch["seed"]
        length = lengths(t, len(seed))
        share = low + (high - low) * random.uniform(seed, (), "prefixed")
        known = ((length * share).floor().minimum(length - 1))[t.sample()]
        shown = t.place() < known
        order = torch.where(shown, 0, orders(t))
        return {**task, self.inner.modality: t._replace(order=order), "asked": task["asked"] & ~shown}
