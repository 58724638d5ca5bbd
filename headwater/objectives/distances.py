"""How far a predicted vector is from a wanted one, as a number per vector: (..., D), (..., D) -> (...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Distance = Literal["squared", "absolute", "smooth", "cosine"]

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda a, b: (a - b).square().mean(-1),
    "absolute": lambda a, b: (a - b).abs().mean(-1),
    "smooth": lambda a, b: F.smooth_l1_loss(a, b, reduction="none").mean(-1),  # Huber's, with beta 1
    "cosine": lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
}


def distance_of(kind: Distance) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of this name; ValueError where there is none."""
    if kind not in DISTANCES:
        raise ValueError(f"found distance {kind!r}; expected one of {', '.join(DISTANCES)}")
    return DISTANCES[kind]
