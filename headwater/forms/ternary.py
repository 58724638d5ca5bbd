"""Ternary weights with 8-bit inputs, trained through the rounding: BitNet b1.58, from the start or after a switch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwater.forms.form import BLOCKS, Form, Full, Schedule, at, wide
from headwater.init import Rule, constant


def ternary(weight: Tensor) -> Tensor:
    """s * round(clip(W / s, -1, 1)) with s = mean |W|: every entry is -s, 0 or s (Ma et al. 2024, arXiv:2402.17764)."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return scale * (weight / scale).clamp(-1, 1).round()


def rounded(x: Tensor, bits: int) -> Tensor:
    """(..., D) at whole steps of the largest absolute value of each vector / (2 ** (bits - 1) - 1)."""
    most = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / most
    return step * (x / step).round().clamp(-most - 1, most)


def straight(x: Tensor, target: Tensor, strength: Tensor) -> Tensor:
    """x + strength * (target - x) with the gradient of x: the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432)."""
    return x + (strength * (target - x)).detach()


class Ternarised(Full):
    """weight = ternary(full), as far as `strength` says; inputs have `bits`. strength: a buffer, () from 0 to 1."""

    strength: Tensor

    def __init__(self, linear: nn.Linear, bits: int | None, strength: float) -> None:
        super().__init__(linear)
        self.bits, self.first = bits, strength
        self.register_buffer("strength", torch.full((), strength, device=linear.weight.device))

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        return super().weight_rules(rule) | {"strength": constant(self.first)}

    @property
    def weight(self) -> Tensor:
        full = wide(self.full)
        return straight(full, ternary(full), self.strength).to(self.full.dtype)

    def apply_weight(self, x: Tensor) -> Tensor:
        if self.bits is not None:
            x = straight(wide(x), rounded(wide(x), self.bits), self.strength).to(x.dtype)
        return super().apply_weight(x)

    def exact_weight(self) -> Tensor:
        if self.bits is not None and self.strength > 0:
            raise ValueError(f"found inputs of {self.bits} bits, which no plain layer has; keep the form, or use exact=False")
        return self.weight

    def restart(self, seed: int, name: str) -> list[nn.Parameter]:
        """Nothing changes but that the optimizer forgets: for the step of the switch."""
        return [self.full]  # type: ignore[list-item]


class Ternary(Form):
    """Weights of three values and inputs of 8 bits, emulated exactly in floats (BitNet b1.58, arXiv:2402.17764).

    The optimizer moves weights in full precision; gradients go straight through the rounding. A schedule of the strength starts in
    16 bits and switches, at once (Step) or by degrees (Linear), which ends lower than ternary from the first step (Nielsen et al.
    2025, arXiv:2502.11895). The moments of the optimizer are kept; `headwater.training.Restarts` clears them.

    Args:
        match, seed: as in Form.
        strength: share of the way from the plain to the rounded value.
        bits: of inputs; None = they are not rounded, and the weights merge.
    """

    layer, weight_only = Ternarised, False

    def __init__(self, match: str = BLOCKS, strength: float | Schedule = 1.0, bits: int | None = 8, seed: int = 0) -> None:
        super().__init__(match, seed)
        if bits is not None and not 2 <= bits <= 16:
            raise ValueError(f"found inputs of {bits} bits; expected 2 to 16, or None for inputs that are not rounded")
        if not callable(strength) and not 0 <= strength <= 1:
            raise ValueError(f"found strength {strength}; expected a share from 0, the plain weight, to 1, the rounded one")
        self.strength, self.bits = strength, bits
        self.settle("strength", strength)

    def make(self, linear: nn.Linear, name: str) -> nn.Module:
        return Ternarised(linear, self.bits, at(self.strength, 0.0))

    def at(self, model: nn.Module, progress: float) -> None:
        if callable(self.strength):
            for _, layer in self.layers(model):
                layer.strength.fill_(self.strength(progress))
