"""The derivative of a learner's loss along a direction of its weights, and how a task designer changes that derivative.

value = <g_down, g_pre(phi)> is the derivative of the pretraining loss L_pre(theta; phi) along g_down. Exact ways differentiate
twice; `Difference` asks for the loss at two nearby weights and needs neither a graph of a graph nor slow attention. Where L_pre is
linear in what the designer makes (weights, soft targets), a difference needs no graph of the learner at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from headwater import distributed
from headwater.attention import higher_order
from headwater.objectives.probe import Ask, Probe, total


class Estimator:
    """Called with a probe, the loss to ask for, a direction of `probe.theta` and the designer's parameters phi.

    Returns the value () and its gradient by phi, both summed over ranks.
    """

    def __call__(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError(f"{type(self).__name__} must return the value and its gradient")


class Double(Estimator):
    """Exact, by differentiating the gradient: the oracle of the others.

    Attention runs on math kernels, and memory is several times as large.
    """

    def __call__(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        whole(probe, type(self).__name__)
        with probe.still(), torch.enable_grad(), higher_order():
            loss = probe.loss(ask)
            slopes = torch.autograd.grad(loss, probe.theta, create_graph=True, allow_unused=True)
            value = sum(((g * d).sum() for g, d in zip(slopes, direction, strict=True) if g is not None), loss.new_zeros(()))
            return finished(value, phi)


class Forward(Estimator):
    """Exact, in forward mode: one pass that carries the derivative along, then one backward pass by phi.

    Attention runs on math kernels, and memory is about twice as large.
    """

    def __call__(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        whole(probe, type(self).__name__)
        with probe.still(), torch.enable_grad(), probe.only(phi), higher_order(), forward_ad.dual_level():
            duals = {
                f"learner.{name}": forward_ad.make_dual(p.detach(), d.to(p.dtype))
                for name, p, d in zip(probe.names, probe.theta, direction, strict=True)
            }
            loss = functional_call(Pass(probe, ask), duals, ())
            value = forward_ad.unpack_dual(loss).tangent
            return finished(loss.new_zeros(()) if value is None else value, phi)


class Difference(Estimator):
    """(L(theta + e d) - L(theta - e d)) / 2e with e |d| = relative * |theta|. Fast kernels stay on; autocast is off inside.

    Args:
        relative: None = the cube root of the precision of the weights, at which rounding and curvature err alike: 5e-3 in
            float32, a quarter of it as attention and norms bend the loss.
        sides: 2, or 1 for a one-sided difference, which saves a backward pass by phi and errs by one order more.
    """

    def __init__(self, relative: float | None = None, sides: int = 2) -> None:
        if (relative is not None and relative <= 0) or sides not in (1, 2):
            raise ValueError(f"found relative={relative} and sides={sides}; expected a step above 0, and 1 or 2 sides")
        self.relative, self.sides = relative, sides

    def __call__(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        relative = self.relative or torch.finfo(probe.theta[0].dtype).eps ** (1 / 3) / 4
        length = probe.norm(direction)
        amount = float(relative * probe.norm(probe.theta) / length.clamp(min=1e-30))
        found = []
        with torch.autocast(probe.theta[0].device.type, enabled=False):
            for side in (amount, -amount if self.sides == 2 else 0.0):
                with probe.nudged(direction, side):
                    found.append(probe.gradient(ask, phi))
        (up, ups), (down, downs) = found
        return (up - down) / (self.sides * amount), [(a - b) / (self.sides * amount) for a, b in zip(ups, downs, strict=True)]


class Pass(nn.Module):
    """A loss as the forward pass of a module that holds the learner, so that its weights can be exchanged for one pass."""

    def __init__(self, probe: Probe, ask: Ask) -> None:
        super().__init__()
        self.learner, self.ask, self.loss = probe.learner, ask, probe.loss

    def forward(self) -> Tensor:
        return self.loss(self.ask)


def finished(value: Tensor, phi: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """A rank's part of the value -> that of all ranks, and its gradient."""
    found: Any = [None] * len(phi)
    if value.requires_grad and phi:
        found = torch.autograd.grad(value, phi, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(phi, found, strict=True)]
    return distributed.total(value), total(gradients)


def whole(probe: Probe, name: str) -> None:
    """ValueError where the weights are split."""
    if probe.shared:
        raise ValueError(f"{name} needs whole weights on every rank, and FSDP2 splits them; use Difference, or the strategy ddp")
