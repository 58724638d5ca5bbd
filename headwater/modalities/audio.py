"""Sound as patches of a log-mel spectrogram, made here in torch: no torchaudio."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater.modalities.image import grid
from headwater.modalities.sound_reader import SoundReader
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

WINDOW, HOP = 0.025, 0.010  # seconds, the field's usual frame


class AudioReader(SoundReader):
    """A sound -> log-mel frames -> patches of `frames` x `height` bands.

    Position: (patch number in time, patch number in frequency). With all bands in one patch tokens follow one another. With
    several, those of one moment share an order and see each other (AST, Gong et al. 2021, arXiv:2104.01778; AudioMAE, Huang et
    al. 2022, arXiv:2207.06405). Signals and random views are those of SoundReader.

    Args:
        rate: samples per second; other rates are resampled.
        bands: mel bands.
        frames: spectrogram frames (10 ms each) per token.
        seconds: the most that is read of a sound.
        soundtrack: read the sound of video files too, where a sample has no sound file.
        height: bands per token; None = all of them.
    """

    def __init__(
        self,
        rate: int = 16_000,
        bands: int = 64,
        frames: int = 8,
        seconds: float = 4.0,
        soundtrack: bool = False,
        height: int | None = None,
    ) -> None:
        super().__init__(rate, seconds, soundtrack)
        if bands % (height or bands):
            raise ValueError(f"found {bands} bands in patches of {height}; expected a height that divides the bands")
        self.bands, self.frames, self.height = bands, frames, height or bands
        self.features = self.height * frames

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        wave = self.wave(signal, view)
        rows = self.bands // self.height
        steps = self.count(len(wave)) // rows
        mel = log_mel(wave, self.rate, self.bands)
        mel = F.pad(mel, (0, 0, 0, -len(mel) % self.frames), value=math.log(1e-5))
        x = rearrange(mel, "(n t) (m f) -> (n m) (t f)", t=self.frames, f=self.height)
        return Tokens(x.to(torch.float16), grid(steps, rows), order=None if rows == 1 else moments(steps, rows))

    def count(self, samples: int) -> int:
        _, hop, size = frame(self.rate)
        return math.ceil((1 + max(samples, size) // hop) / self.frames) * (self.bands // self.height)

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=(t.x.to(torch.float32) + 5.0) / 4.0)  # log-mel of speech lies around -5 with deviation 4

    def blank(self) -> Tokens:
        rows = self.bands // self.height
        steps = self.count(round(self.seconds * self.rate)) // rows
        return self.canvas(grid(steps, rows), None if rows == 1 else moments(steps, rows))

    def restore(self, t: Tokens) -> np.ndarray:
        """The log-mel spectrogram (frames, bands); a waveform needs a vocoder."""
        x = t.x[0][t.real()[0]] * 4.0 - 5.0
        shape = {"m": self.bands // self.height, "t": self.frames}
        return rearrange(x, "(n m) (t f) -> (n t) (m f)", **shape).cpu().numpy()


class Audio(Encoder):
    """A transformer over log-mel patches.

    Args:
        trunk: the transformer.
        rate: samples per second; other rates are resampled.
        bands: mel bands.
        frames: spectrogram frames (10 ms each) per token.
        seconds: the most that is read of a sound.
        soundtrack: read the sound of video files too, where a sample has no sound file.
        height: bands per token; None = all of them, one token per moment.
        pooling: see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        rate: int = 16_000,
        bands: int = 64,
        frames: int = 8,
        seconds: float = 4.0,
        soundtrack: bool = False,
        height: int | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(AudioReader(rate, bands, frames, seconds, soundtrack, height), trunk, pooling)


def log_mel(wave: Tensor, rate: int, bands: int) -> Tensor:
    """(T,) samples -> (frames, bands) natural log of mel power, floored at 1e-5; one frame per 10 ms, 25 ms Hann windows."""
    window, hop, size = frame(rate)
    wave = F.pad(wave, (0, max(0, size - len(wave))))
    spectrum = torch.stft(wave, size, hop, window, hann(window), center=True, return_complex=True, pad_mode="constant")
    return (spectrum.abs().square().T @ mel_bank(rate, size, bands)).clamp(min=1e-5).log()


def frame(rate: int) -> tuple[int, int, int]:
    """Samples of a window, between two windows, and of the Fourier transform around it."""
    window = int(WINDOW * rate)
    return window, int(HOP * rate), 2 ** math.ceil(math.log2(window))


@lru_cache(maxsize=8)
def hann(window: int) -> Tensor:
    """The Hann window, (window,)."""
    return torch.hann_window(window)


@lru_cache(maxsize=8)
def mel_bank(rate: int, size: int, bands: int) -> Tensor:
    """Triangular filters, (size // 2 + 1, bands), evenly spaced on the HTK mel scale 2595 log10(1 + f / 700) to rate / 2."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corner = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)[:, None]
    rise = (frequency - corner[:-2]) / (corner[1:-1] - corner[:-2])
    fall = (corner[2:] - frequency) / (corner[2:] - corner[1:-1])
    return torch.minimum(rise, fall).clamp(min=0).float()


@lru_cache(maxsize=1024)
def moments(steps: int, rows: int) -> Tensor:
    """The moment of every token, (steps * rows,) int64. Made once and shared: never write into it."""
    return grid(steps, rows)[:, 0].long()
