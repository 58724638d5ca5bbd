"""What a vector head means in denoising: the path from signal to noise, and which of their mixtures is predicted.

Everything is a mixture of the signal x and of standard normal noise e: what is shown is x_t = a x + s e, and what is asked for
is y = p x + q e, with coefficients that depend on the time t, from 0, the signal, to 1, the noise. So all kinds of prediction
are turned into one another by solving two linear equations. It belongs to the model, because sampling needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headwater.spec import Described

Path = Literal["rectified", "cosine", "linear"]
Prediction = Literal["velocity", "noise", "signal", "v"]
Pair = tuple[Tensor, Tensor]

FIRST, LAST = 1e-3, 0.995  # times beyond which a prediction of the signal tells nothing of the noise, and the reverse
SLOW, FAST = 0.1, 20.0  # rates of the linear path at both ends


def rectified(t: Tensor) -> tuple[Pair, Pair]:
    """A straight line: x_t = (1 - t) x + t e (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747)."""
    one = torch.ones_like(t)
    return (1 - t, t), (-one, one)


def cosine(t: Tensor) -> tuple[Pair, Pair]:
    """A quarter of a circle: a = cos(pi t / 2), s = sin(pi t / 2) (Nichol and Dhariwal 2021, arXiv:2102.09672, without offset)."""
    angle = t * math.pi / 2
    a, s = angle.cos(), angle.sin()
    return (a, s), (-s * math.pi / 2, a * math.pi / 2)


def linear(t: Tensor) -> tuple[Pair, Pair]:
    """DDPM's rates from 0.1 to 20, in continuous time: a = exp(-t^2 (20 - 0.1) / 4 - 0.1 t / 2), s^2 = 1 - a^2.

    Ho et al. 2020, arXiv:2006.11239; Song et al. 2020, arXiv:2011.13456.
    """
    rate = SLOW + (FAST - SLOW) * t
    log_a = -(FAST - SLOW) * t.square() / 4 - SLOW * t / 2
    a, s = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
    return (a, s), (-rate / 2 * a, rate / 2 * a.square() / s)


PATHS: dict[str, Callable[[Tensor], tuple[Pair, Pair]]] = {"rectified": rectified, "cosine": cosine, "linear": linear}


class Ends(NamedTuple):
    """Both ends of the path through a noisy value: signal and noise, each of its shape."""

    signal: Tensor
    noise: Tensor


class Process(Described):
    """Path and prediction of one modality of vectors. Plain and without parameters; it travels with the weights.

    Times t are tensors that broadcast against the values.

    Args:
        path: "rectified" = a straight line; "cosine" and "linear" keep the variance, with the rates of those names.
        predicts: "velocity" = dx_t / dt, "noise" = e, "signal" = x, "v" = a e - s x (Salimans and Ho 2022, arXiv:2202.00512).
        told: modalities whose pooled vectors join the time in the condition, as a class does in DiT; others that help come as
            tokens, through the fusion.
    """

    def __init__(self, path: Path = "rectified", predicts: Prediction = "velocity", told: Sequence[str] = ()) -> None:
        if path not in PATHS:
            raise ValueError(f"found path {path!r}; expected one of {', '.join(PATHS)}")
        if predicts not in ("velocity", "noise", "signal", "v"):
            raise ValueError(f"found predicts {predicts!r}; expected velocity, noise, signal or v")
        self.path, self.predicts, self.told = path, predicts, tuple(told)

    def shown(self, t: Tensor) -> Pair:
        """a and s: what is shown of signal and noise."""
        return PATHS[self.path](t)[0]

    def asked(self, t: Tensor) -> Pair:
        """p and q: what is asked for of signal and noise."""
        (a, s), slope = PATHS[self.path](t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return {"velocity": slope, "noise": (zero, one), "signal": (one, zero), "v": (-s, a)}[self.predicts]

    def within(self, t: Tensor) -> Tensor:
        """Times at which what is asked for determines both ends."""
        return t.clamp(FIRST, LAST if self.predicts == "noise" else 1.0)

    def noisy(self, signal: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        a, s = self.shown(t)
        return a * signal + s * noise

    def target(self, signal: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """y, what the head shall say at x_t."""
        p, q = self.asked(t)
        return p * signal + q * noise

    def ends(self, noisy: Tensor, said: Tensor, t: Tensor) -> Ends:
        """What the head said at x_t -> the signal and the noise that it means."""
        (a, s), (p, q) = self.shown(t), self.asked(t)
        return Ends((q * noisy - s * said) / self.scale(t), (a * said - p * noisy) / self.scale(t))

    def velocity(self, noisy: Tensor, said: Tensor, t: Tensor) -> Tensor:
        """What the head said at x_t -> dx_t / dt, along which the signal is reached without new noise."""
        if self.predicts == "velocity":
            return said
        signal, noise = self.ends(noisy, said, t)
        fading, rising = PATHS[self.path](t)[1]
        return fading * signal + rising * noise

    def scale(self, t: Tensor) -> Tensor:
        """a q - s p: an error of y is this, over -s, of what it is in the signal, and over a in the noise."""
        (a, s), (p, q) = self.shown(t), self.asked(t)
        return a * q - s * p

    def min_snr(self, t: Tensor, most: float = 5.0) -> Tensor:
        """Factor on the squared error of y that makes it min(a^2 / s^2, most) times that of the signal.

        Min-SNR weighting (Hang et al. 2023, arXiv:2303.09556; https://github.com/TiankaiHang/Min-SNR-Diffusion-Training).
        """
        a, s = self.shown(t)
        return (a / s).square().clamp(max=most) * (s / self.scale(t)).square()
