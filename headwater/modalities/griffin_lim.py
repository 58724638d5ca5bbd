"""From a log-mel spectrogram back to a sound that has nearly the same one, without a learned vocoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwater import random
from headwater.modalities.audio import frame, hann, mel_bank

TINY = 1e-12


def griffin_lim(log_mel: Tensor, rate: int, steps: int = 60, momentum: float = 0.99) -> Tensor:
    """(frames, bands) as `audio.log_mel` makes it -> samples (T,), T = (frames - 1) hops of 10 ms.

    Phases are found by going back and forth between the spectrogram with the wanted magnitudes and the nearest one that a sound
    can have (Griffin and Lim 1984), with the momentum of Perraudin et al. 2013 ("A fast Griffin-Lim algorithm").
    """
    window, hop, size = frame(rate)
    shape: dict[str, Any] = {"n_fft": size, "hop_length": hop, "win_length": window, "window": hann(window)}
    power = linear(log_mel.float().cpu().exp(), mel_bank(rate, size, log_mel.shape[1]))
    magnitude, length = power.sqrt().T, (len(log_mel) - 1) * hop
    angle = 2 * torch.pi * random.uniform(torch.tensor(0), magnitude.shape, "griffin-lim")
    phase, before = torch.polar(torch.ones_like(angle), angle), torch.zeros_like(magnitude, dtype=torch.complex64)
    for _ in range(steps):
        wave = torch.istft(magnitude * phase, **shape, length=length)
        found = torch.stft(wave, **shape, center=True, pad_mode="constant", return_complex=True)
        ahead = found + momentum * (found - before)
        phase, before = ahead / ahead.abs().clamp(min=TINY), found
    return torch.istft(magnitude * phase, **shape, length=length)


def linear(mel: Tensor, bank: Tensor, steps: int = 100) -> Tensor:
    """The power spectrum (frames, F), nowhere below 0, whose mel bands are nearest to those given, (frames, bands).

    bank: (F, bands). By multiplicative updates (Lee and Seung 2001, "Algorithms for non-negative matrix factorization").
    """
    power = (mel @ torch.linalg.pinv(bank)).clamp(min=TINY)
    wanted, gram = mel @ bank.T, bank @ bank.T
    for _ in range(steps):
        power = power * wanted / (power @ gram).clamp(min=TINY)
    return power
