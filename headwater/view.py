"""A random view of a signal, asked for by an objective or a source and made by the reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater import random


@dataclass(frozen=True)
class View:
    """What part of a signal is seen, how large, and how much its values may change.

    Each reader says in its docstring what it makes of these; what has no meaning for a signal is left out.

    Args:
        share: smallest and largest part of the signal that is seen: of a picture's area, a sound's time, a cloud's points; None =
            what the reader finds fit.
        scale: side of the view over the side that the reader gives: at 0.5 a picture has a quarter of its patches.
        strength: 0 to 1, how much values change: colour, brightness and mirror image of a picture, loudness and noise of a
            sound, words that a text loses.
        seed: of all draws; the loader sets it, from the seed of the sample and the name of the view.
    """

    share: tuple[float, float] | None = None
    scale: float = 1.0
    strength: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share[0] <= self.share[1] <= 1:
            raise ValueError(f"found a view with share {self.share}; expected 0 < smallest <= largest <= 1, for example [0.4, 1.0]")
        if not 0 < self.scale <= 1:
            raise ValueError(f"found a view with scale {self.scale}; expected a factor above 0 and at most 1 on the side")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"found a view with strength {self.strength}; expected 0 (values stay) to 1")

    def uniform(self, shape: Sequence[int], name: str) -> Tensor:
        """Draws in [0, 1) of this view, float32."""
        return torch.from_numpy(np.asarray(random.uniform_of(self.seed, shape, name)))

    def part(self, draw: float, default: tuple[float, float]) -> float:
        """The share that a draw in [0, 1) stands for. default: smallest and largest where the view names none."""
        low, high = self.share or default
        return low + (high - low) * draw
