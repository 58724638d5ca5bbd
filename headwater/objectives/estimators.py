"""The derivative of a learner's loss along a direction of its weights, and how a task designer changes that derivative.

value = <g_down, g_pre(phi)> is the derivative of the pretraining loss L_pre(theta; phi) along g_down. Exact ways differentiate
twice; `Difference` asks for the loss at two nearby weights and needs neither a graph of a graph nor slow attention. Where L_pre is
linear in what the designer makes (weights, soft targets), a difference needs no graph of the learner at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from headwater import distributed
from headwater.attention import higher_order
from headwater.init import ONE, Rule
from headwater.objectives.probe import Ask, Probe, total


class Estimator(nn.Module):
    """Called with a probe, the loss to ask for, a direction of `probe.theta` and the designer's parameters phi.

    Returns the value () and its gradient by phi, both summed over ranks.
    """

    def forward(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError(f"{type(self).__name__} must return the value and its gradient")


class Double(Estimator):
    """Exact, by differentiating the gradient: the oracle of the others.

    Attention runs on math kernels, and memory is several times as large.
    """

    def forward(
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

    Attention runs on math kernels, and memory is about twice as large. torch cannot go backward through a softmax in forward mode,
    so where the designer changes what attention sees, as views do, take another one.
    """

    def forward(
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
        super().__init__()
        self.relative, self.sides = relative, sides
        self.factor: Tensor
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))  # on the step; `Checked` changes it

    def init_rules(self) -> dict[str, Rule]:
        return {"factor": ONE}

    def forward(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        relative = self.relative or torch.finfo(probe.theta[0].dtype).eps ** (1 / 3) / 4
        length = probe.norm(direction)
        amount = float(self.factor * relative * probe.norm(probe.theta) / length.clamp(min=1e-30))
        found = []
        with torch.autocast(probe.theta[0].device.type, enabled=False):
            for side in (amount, -amount if self.sides == 2 else 0.0):
                with probe.nudged(direction, side):
                    found.append(probe.gradient(ask, phi))
        (up, ups), (down, downs) = found
        return (up - down) / (self.sides * amount), [(a - b) / (self.sides * amount) for a, b in zip(ups, downs, strict=True)]


class Checked(Estimator):
    """Another estimator, beside double backward now and then: a warning says when they disagree.

    The step of a `Difference` then becomes the best of a quarter, one and four times itself. Memory of double backward is needed
    in such a step, so combine it with `pieces`.

    Args:
        estimator: what is used; None = Difference().
        every: steps of the run between comparisons, a multiple of the steps between batches of feedback.
        least: cosine between the two gradients by the designer.
    """

    def __init__(self, estimator: Estimator | None = None, every: int = 200, least: float = 0.98) -> None:
        super().__init__()
        if every < 1 or not -1 <= least <= 1:
            raise ValueError(f"found every={every} and least={least}; expected 1 or more steps, and a cosine")
        self.estimator, self.every, self.least = estimator or Difference(), every, least

    def forward(
        self, probe: Probe, ask: Ask, direction: Sequence[Tensor], phi: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        found = self.estimator(probe, ask, direction, phi)
        if probe.step % self.every:
            return found
        exact = Double()(probe, ask, direction, phi)
        agreement = cosine(probe, found[1], exact[1])
        probe.tell("estimator", agreement)
        if agreement >= self.least:
            return found
        name = type(self.estimator).__name__
        rank_zero_warn(
            f"step {probe.step}: {name} and double backward disagree about the designer's gradient (cosine {agreement:.3f})"
        )
        if isinstance(self.estimator, Difference):
            first, tried = self.estimator.factor.clone(), {}
            for factor in (0.25, 1.0, 4.0):
                self.estimator.factor.copy_(first * factor)
                tried[factor] = float(cosine(probe, self.estimator(probe, ask, direction, phi)[1], exact[1]))
            self.estimator.factor.copy_(first * max(tried, key=lambda factor: tried[factor]))
        return exact


def cosine(probe: Probe, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Of two gradients."""
    return probe.dot(a, b) / (probe.norm(a) * probe.norm(b)).clamp(min=1e-30)


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
