"""How much of each modality of a sample is hidden, where several are hidden at once and some as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwater import random
from headwater.objectives.masks.policies import lengths
from headwater.tokens import Tokens


def ratios(signals: Mapping[str, Tokens], seed: Tensor, fixed: Mapping[str, float], whole: float, deal: bool) -> dict[str, Any]:
    """Of each hidden modality: one ratio for all samples, or (S,) where samples differ.

    signals: all modalities, those of `fixed` first, in its order. seed: (S,). fixed: modality that is hidden -> its ratio.
    whole: share of the samples of which one hidden modality, drawn among those that they have, gets the ratio 1, if they have
    another one. deal: see `dealt`.
    """
    if not (whole or deal):
        return dict(fixed)
    several = torch.stack([lengths(t, len(seed)) for t in signals.values()], 1)
    length = several[:, : len(fixed)]
    ratio = length.new_tensor([*fixed.values()]).expand_as(length)
    if deal:
        ratio = dealt(length, ratio[:, :1], random.uniform(seed, (len(fixed),), "mask/deal"))
    draw = random.uniform(seed, (len(fixed),), "mask/which").masked_fill(length == 0, -1.0)
    chosen = torch.zeros_like(length, dtype=torch.bool).scatter(1, draw.argmax(1, keepdim=True), True)
    gone = chosen & ((several > 0).sum(1, keepdim=True) > 1) & (random.uniform(seed, (1,), "mask/whole") < whole)
    return dict(zip(fixed, torch.where(gone, 1.0, ratio).unbind(1), strict=True))


def dealt(length: Tensor, ratio: Tensor, draw: Tensor) -> Tensor:
    """Ratios (S, M) with which samples show (1 - ratio) of all their tokens, dealt out by Dirichlet(1, ..., 1).

    What a modality has too few tokens for goes to the others, by what they have left. length: (S, M); ratio: (S, 1);
    draw: (S, M) in [0, 1).
    """
    share = -torch.log1p(-draw) * (length > 0)
    visible = (1 - ratio) * length.sum(1, keepdim=True)
    shown = (share / share.sum(1, keepdim=True).clamp(min=1e-9) * visible).minimum(length)
    rest = length - shown
    shown = shown + (visible - shown.sum(1, keepdim=True)) * rest / rest.sum(1, keepdim=True).clamp(min=1e-9)
    return 1 - shown / length.clamp(min=1)


def spared(signals: Mapping[str, Tokens], hidden: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """What is hidden (B, N), but nothing of samples of which then nothing would be seen in any modality."""
    seen = torch.zeros(samples, device=next(iter(hidden.values())).device)
    for name, t in signals.items():
        shown = t.real() & ~hidden[name] if name in hidden else t.real()
        seen = seen.index_add(0, t.sample().flatten(), shown.flatten().float())
    return {name: chosen & (seen > 0)[signals[name].sample()] for name, chosen in hidden.items()}
