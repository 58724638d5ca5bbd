"""Training whose matrix products have narrow inputs, emulated: NVFP4 with its rotation and stochastic rounding, and FP8."""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headwater import distributed, random
from headwater.forms.form import BLOCKS, Form, Full, wide
from headwater.forms.formats import BLOCK, nvfp4, rotated, rotation, scaled8
from headwater.init import ZERO, Rule


class Arithmetic(Protocol):
    """The three products of a linear layer: x (T, in), weight (out, in), gradient (T, out). seed: () int64, of this step."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(T, out)."""

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""


class FourBits:
    """NVFP4 in all three products. rotate: inputs of the weight's gradient; stochastic: rounding of gradients; square: blocks of
    the weight, so that both passes see one weight."""

    def __init__(self, rotate: bool = True, stochastic: bool = True, square: bool = True, seed: int = 0) -> None:
        self.rotate, self.stochastic, self.tall = rotate, stochastic, BLOCK if square else 1
        self.signs = 2.0 * (random.uniform(torch.tensor(seed, device="cpu"), (BLOCK,), "rotation") < 0.5) - 1

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return nvfp4(x) @ nvfp4(weight, self.tall).T

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        back = nvfp4(gradient, noise=self.noise(gradient, seed, "input")) @ nvfp4(weight.T, self.tall).T
        if self.rotate:
            turn = rotation(self.signs.to(x))
            gradient, x = rotated(gradient, turn), rotated(x, turn)
        gradient, x = gradient.T, x.T
        return back, nvfp4(gradient, noise=self.noise(gradient, seed, "weight")) @ nvfp4(x).T

    def noise(self, like: Tensor, seed: Tensor, name: str) -> Tensor | None:
        """What decides where gradients are rounded to; None = the nearest."""
        return random.uniform(seed, like.shape, name).to(like) if self.stochastic else None


class EightBits:
    """E4M3 for inputs and weights, E5M2 for gradients, one scale per tensor (Micikevicius et al. 2022, arXiv:2209.05433)."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return scaled8(x) @ scaled8(weight).T

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        gradient = scaled8(gradient, e5=True)
        return gradient @ scaled8(weight), gradient.T @ scaled8(x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, seed: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(x, weight, seed)
        ctx.arithmetic = arithmetic
        with torch.autocast(x.device.type, enabled=False):
            return arithmetic.forward(wide(x), wide(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, seed = ctx.saved_tensors
        seed = random.fold(seed, distributed.rank())
        with torch.autocast(x.device.type, enabled=False):
            back, change = ctx.arithmetic.backward(wide(gradient), wide(x), wide(weight), seed)
        return back.to(x.dtype), change.to(weight.dtype), None, None


class Narrow(Full):
    """Products of narrow numbers; `full` and its gradient are wide. step: a buffer, () int64, from which rounding is drawn."""

    step: Tensor

    def __init__(self, linear: nn.Linear, arithmetic: Arithmetic) -> None:
        super().__init__(linear)
        self.arithmetic = arithmetic
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=linear.weight.device))

    def weight_rules(self, rule: Rule) -> dict[str, Rule]:
        return super().weight_rules(rule) | {"step": ZERO}

    @property
    def weight(self) -> Tensor:
        return self.full

    def exact_weight(self) -> Tensor:
        raise ValueError("found products of narrow numbers, which no plain layer has; keep the form, or use exact=False")

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        y = _Product.apply(x.flatten(0, -2), self.full, self.step, self.arithmetic).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class NVFP4(Form):
    """4-bit training, emulated exactly in values and not in speed (NVIDIA 2025, arXiv:2509.25149).

    All three products of a layer have inputs in NVFP4. Those of the weight's gradient are rotated by a random Hadamard matrix,
    gradients are rounded stochastically, weights have square blocks. Norms, attention and optimizer stay as they are.

    Args:
        match, seed: as in Form.
        high: share of these layers, the last ones, that is left in the run's own precision, as the paper does.
        rotate, stochastic, square: the three measures; all False is plain rounding.
    """

    layer, weight_only = Narrow, False

    def __init__(
        self,
        match: str = BLOCKS,
        high: float = 0.15,
        rotate: bool = True,
        stochastic: bool = True,
        square: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(match, seed)
        if not 0 <= high < 1:
            raise ValueError(f"found high {high}; expected the share of layers to leave as they are, from 0 to below 1")
        self.high, self.arithmetic = high, FourBits(rotate, stochastic, square, seed)

    def found(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        every = super().found(model)
        return every[: len(every) - min(len(every) - 1, round(self.high * len(every)))]

    def make(self, linear: nn.Linear, name: str) -> nn.Module:
        return Narrow(linear, self.arithmetic)

    def at(self, model: nn.Module, progress: float) -> None:
        """Other draws in every step."""
        for name, layer in self.layers(model):
            layer.step.fill_(random.seed_of(self.seed, zlib.crc32(name.encode()), int(progress * (1 << 52))))


class FP8(Form):
    """8-bit training, emulated exactly in values and not in speed: E4M3 forward, E5M2 backward (arXiv:2209.05433).

    Args:
        match, seed: as in Form.
    """

    layer, weight_only = Narrow, False

    def make(self, linear: nn.Linear, name: str) -> nn.Module:
        return Narrow(linear, EightBits())
