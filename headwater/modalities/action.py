"""Actions: one token per step, discrete ids or vectors whose absent slots are marked."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater import random
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk


class ActionReader(Reader):
    """An .npy array of steps -> tokens at the time of the step; order is the step, so step t sees the frames up to t.

    Integers (T,) are ids below `choices`. Floats (T, D) are vectors of `slots` numbers: a NaN, or a column that this robot
    does not have, is an absent slot.

    Args:
        choices: number of discrete actions; 0 = continuous.
        slots: size of a continuous action; narrower arrays are filled with absent slots.
        steps: the most steps that are read.
        scale: continuous values are divided by this.
    """

    extensions = ("npy", "action.npy")

    def __init__(self, choices: int = 0, slots: int = 0, steps: int = 64, scale: float = 1.0) -> None:
        if (choices > 0) == (slots > 0):
            raise ValueError(f"found choices={choices} and slots={slots}; give exactly one: ids below choices, or vectors of slots")
        self.choices, self.slots, self.steps, self.scale = choices, slots, steps, scale
        self.vocab, self.features = (choices or None), slots

    def decode(self, members: dict[str, bytes]) -> np.ndarray:
        return np.load(io.BytesIO(members[str(self.member(members))]), allow_pickle=False)

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        steps = np.asarray(signal)[: self.steps]
        if not len(steps):
            raise ValueError("the action sequence has no step")
        x = self._ids(steps) if self.vocab else self._vectors(steps)
        time = torch.arange(len(x))
        return Tokens(x, time[:, None].int(), order=time)

    def _ids(self, steps: np.ndarray) -> Tensor:
        if not np.issubdtype(steps.dtype, np.integer) or steps.ndim != 1 or steps.min() < 0 or steps.max() >= self.choices:
            span = f" from {steps.min()} to {steps.max()}"
            raise ValueError(
                f"found actions {steps.dtype} {steps.shape}{span}; expected whole numbers (T,) from 0 to {self.choices - 1}"
            )
        return torch.from_numpy(steps.astype(np.int64))

    def _vectors(self, steps: np.ndarray) -> Tensor:
        if not np.issubdtype(steps.dtype, np.floating) or steps.ndim != 2 or steps.shape[1] > self.slots:
            raise ValueError(f"found actions {steps.dtype} {steps.shape}; expected floats (T, up to {self.slots})")
        x = torch.full((len(steps), self.slots), float("nan"))
        x[:, : steps.shape[1]] = torch.from_numpy(steps.astype(np.float32))
        return x

    def prepare(self, t: Tokens) -> Tokens:
        return t if self.vocab else t._replace(x=t.x.to(torch.float32) / self.scale)

    def restore(self, t: Tokens) -> np.ndarray:
        x = t.x[0][t.real()[0]]
        return (x if self.vocab else x * self.scale).cpu().numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        draws = random.uniform(torch.tensor(seed), (n, 6, max(self.slots, 1)), "action")
        if self.vocab:
            return [self.tokens((d[: 3 + k % 4, 0] * self.choices).long().numpy()) for k, d in enumerate(draws)]
        return [self.tokens(d[: 3 + k % 4, : max(1, self.slots - k % 2)].numpy()) for k, d in enumerate(draws)]


class Action(Encoder):
    """A transformer over steps. A continuous step enters with a flag per absent slot.

    Args:
        trunk: the transformer.
        choices: number of discrete actions; 0 = continuous.
        slots: size of a continuous action.
        steps: the most steps that are read.
        scale: continuous values are divided by this.
    """

    def __init__(self, trunk: Trunk, choices: int = 0, slots: int = 0, steps: int = 64, scale: float = 1.0) -> None:
        super().__init__(ActionReader(choices, slots, steps, scale), trunk)
        self.absent = None if choices else nn.Linear(slots, trunk.width, bias=False)

    def embed(self, raw: Tokens) -> Tokens:
        if self.absent is None:
            return super().embed(raw)
        missing = raw.x.isnan()
        return raw._replace(x=self.stem(raw.x.nan_to_num()) + self.absent(missing.to(raw.x.dtype)))
