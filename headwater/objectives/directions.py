"""Where feedback wants the learner to go, not in one step, but once it has learned what its task teaches.

With theta*(phi) the minimum of L_pre(theta; phi) and H its Hessian, implicit differentiation gives
d L_down / d phi = -(d^2 L_pre / d phi d theta) H^-1 g_down: minus the gradient of the value <H^-1 g_down, grad L_pre(phi)>.
So all that changes is the direction along which values are taken. H = I is the look one step ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from headwater.objectives.curvature import hessian_product
from headwater.objectives.probe import Ask, Probe


class Direction:
    """Called with a probe, the loss that the learner descends, and g_down; returns the direction of the value."""

    def __call__(self, probe: Probe, ask: Ask, slope: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must return a direction")


class Neumann(Direction):
    """H^-1 g by rate * sum_(k <= terms) (I - rate H)^k g. Each term costs two gradients of the loss.

    Lorraine et al. 2020, arXiv:1911.02590; for pretraining Raghu et al. 2021, arXiv:2111.01754.

    The series ends early where its terms begin to grow: behind that point it says nothing, because the rate is above
    2 / the largest curvature or the loss curves downwards.

    Args:
        terms: of the series, beside the first; as many as steps of gradient descent that are looked ahead.
        rate: at which these steps go; below 2 / the largest eigenvalue of H.
        damping: added to the curvature, so that flat and slightly concave directions count less.
    """

    def __init__(self, terms: int = 5, rate: float = 0.1, damping: float = 0.0) -> None:
        if terms < 0 or rate <= 0 or damping < 0:
            raise ValueError(f"found terms={terms}, rate={rate}, damping={damping}; expected a rate above 0, the others 0 or more")
        self.terms, self.rate, self.damping = terms, rate, damping

    def __call__(self, probe: Probe, ask: Ask, slope: Sequence[Tensor]) -> list[Tensor]:
        term, found = list(slope), list(slope)
        length, done = float(probe.norm(term)), 0
        enough = torch.finfo(term[0].dtype).eps ** 0.5 * length  # shorter terms are rounding
        while done < self.terms and length > enough:
            with torch.autocast(probe.theta[0].device.type, enabled=False):  # small differences of gradients
                bent = hessian_product(probe, ask, term)
            term = [(1 - self.rate * self.damping) * t - self.rate * h for t, h in zip(term, bent, strict=True)]
            before, length = length, float(probe.norm(term))
            if length > before * (1 + 1e-3):  # rounding alone does not count
                rank_zero_warn(
                    f"the Neumann series grows behind {done} of {self.terms} terms and ends there; lower its rate of {self.rate}, "
                    "or raise its damping"
                )
                break
            found = [f + t for f, t in zip(found, term, strict=True)]
            done += 1
        probe.tell("neumann", done)
        return [self.rate * f for f in found]
