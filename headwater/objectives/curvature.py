"""How the gradient changes along a direction of the weights: products with the Hessian, which is never made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.objectives.probe import Ask, Probe


def hessian_product(probe: Probe, ask: Ask, direction: Sequence[Tensor], relative: float | None = None) -> list[Tensor]:
    """H v, of the loss that is asked for, by (g(theta + e v) - g(theta - e v)) / 2e with e |v| = relative * |theta|.

    Two gradients by ordinary backward passes, so fast kernels stay on, and it works under DDP and FSDP2 (Pearlmutter 1994 gives the
    exact way). The error falls with e^2, until rounding grows with 1/e.

    Args:
        direction: v, as `probe.theta` is held; the product comes back so.
        relative: None = the cube root of the precision of the weights, 5e-3 in float32, over 4.
    """
    if relative is not None and relative <= 0:
        raise ValueError(f"found relative={relative}; expected a step above 0")
    share = relative or torch.finfo(probe.theta[0].dtype).eps ** (1 / 3) / 4
    amount = float(share * probe.norm(probe.theta) / probe.norm(direction).clamp(min=1e-30))
    found = []
    for side in (amount, -amount):
        with probe.nudged(direction, side):
            found.append(probe.gradient(ask, probe.theta)[1])
    return [(up - down) / (2 * amount) for up, down in zip(*found, strict=True)]
