"""Actions: one token per step, discrete ids or vectors whose absent slots are marked."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater import random
from headwater.modalities.image import grid
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
        return array(members[str(self.member(members))])

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        steps = np.asarray(signal)
        if not steps.size:
            raise ValueError("the action sequence has no step")
        x = self._ids(steps) if self.vocab else self._vectors(steps)
        return Tokens(x, grid(len(x)), order=moments(len(x)))

    def _ids(self, steps: np.ndarray) -> Tensor:
        if steps.dtype.kind not in "iu" or steps.ndim != 1:
            raise ValueError(f"found actions {steps.dtype} {steps.shape}; expected whole numbers (T,) below {self.choices}")
        steps = steps[: self.steps]
        if steps.min() < 0 or steps.max() >= self.choices:
            raise ValueError(f"found actions from {steps.min()} to {steps.max()}; expected 0 to {self.choices - 1}")
        return torch.from_numpy(steps.astype(np.int64))

    def _vectors(self, steps: np.ndarray) -> Tensor:
        if steps.dtype.kind != "f" or steps.ndim != 2 or steps.shape[1] > self.slots:
            raise ValueError(f"found actions {steps.dtype} {steps.shape}; expected floats (T, up to {self.slots})")
        steps = steps[: self.steps]
        x = np.full((len(steps), self.slots), np.nan, np.float32)
        x[:, : steps.shape[1]] = steps
        return torch.from_numpy(x)

    def length(self, facts: dict[str, float]) -> int | None:
        return min(int(facts["steps"]), self.steps) if "steps" in facts else None

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


def array(content: bytes) -> np.ndarray:
    """An .npy file as an array that shares its bytes. ValueError when it is none, is cut off, or holds Python objects."""
    wide = 2 if content[6:7] == b"\x01" else 4  # of the header's length, by the version of the format
    start = 8 + wide + int.from_bytes(content[8 : 8 + wide], "little")
    shape, by_column, dtype = header(content[:start])
    count = math.prod(shape)
    if len(content) < start + count * dtype.itemsize:
        raise ValueError(f"the .npy is cut off: {dtype} {shape} does not fit into its {len(content)} bytes")
    flat = np.frombuffer(content, dtype, count, start) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if by_column else "C")


@lru_cache(maxsize=1024)
def header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored by columns, and dtype; cached, because the files of a source share few headers."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version > (2, 0):
        raise ValueError(f"found an .npy of version {version}, with named columns; expected plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"the .npy holds Python objects ({dtype}) as a pickle, which is never decoded; save numbers instead")
    return shape, by_column, dtype


@lru_cache(maxsize=4096)
def moments(steps: int) -> Tensor:
    """0 to steps - 1, int64. Made once and shared: never write into it."""
    return torch.arange(steps)
