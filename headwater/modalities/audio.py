"""Sound as patches of a log-mel spectrogram, made here in torch: no torchaudio."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.modalities.image import grid
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk

WINDOW, HOP = 0.025, 0.010  # seconds, the field's usual frame


class AudioReader(Reader):
    """A sound file of any rate and channel count -> mono at `rate` -> log-mel frames -> patches of `frames` x all bands.

    Position: (patch number in time, 0). A random view changes loudness and shifts the sound by up to a tenth of a second.
    The signal is (samples (T,) float32 in [-1, 1], rate in Hz).
    """

    extensions = ("wav", "flac", "ogg", "mp3", "opus")

    def __init__(self, rate: int = 16_000, bands: int = 64, frames: int = 8, seconds: float = 4.0) -> None:
        self.rate, self.bands, self.frames, self.seconds = rate, bands, frames, seconds
        self.features = bands * frames

    def decode(self, members: dict[str, bytes]) -> tuple[Tensor, int]:
        import soundfile

        wave, rate = soundfile.read(io.BytesIO(members[str(self.member(members))]), dtype="float32", always_2d=True)
        if not len(wave):
            raise ValueError("the sound has no samples")
        if not np.any(wave):
            raise ValueError("the sound is all zero; a recorder or simulator without an audio device writes that")
        return torch.from_numpy(wave.mean(1)), rate

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        wave, rate = signal if isinstance(signal, tuple) else (signal, self.rate)
        wave = resample(torch.as_tensor(wave, dtype=torch.float32), rate, self.rate)[: int(self.seconds * self.rate)]
        if view is not None:
            gain, shift = random.uniform(view, (2,), "audio").tolist()
            wave = F.pad(wave * 2 ** (2 * gain - 1), (round(shift * 0.1 * self.rate), 0))
        mel = log_mel(wave, self.rate, self.bands)
        mel = F.pad(mel, (0, 0, 0, -len(mel) % self.frames), value=math.log(1e-5))
        x = rearrange(mel, "(n t) f -> n (t f)", t=self.frames)
        return Tokens(x.to(torch.float16), grid(len(x), 1))

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=(t.x.to(torch.float32) + 5.0) / 4.0)  # log-mel of speech lies around -5 with deviation 4

    def restore(self, t: Tokens) -> np.ndarray:
        """The log-mel spectrogram (frames, bands); a waveform needs a vocoder."""
        x = t.x[0][t.real()[0]] * 4.0 - 5.0
        return rearrange(x, "n (t f) -> (n t) f", t=self.frames).cpu().numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        pitch = 200 + 600 * random.uniform(torch.tensor(seed), (n,), "audio")
        return [
            self.tokens(torch.sin(2 * math.pi * p * torch.arange(int(self.rate * (0.2 + 0.1 * (k % 3)))) / self.rate))
            for k, p in enumerate(pitch.tolist())
        ]


class Audio(Encoder):
    """A transformer over log-mel patches.

    Args:
        trunk: the transformer.
        rate: samples per second; other rates are resampled.
        bands: mel bands.
        frames: spectrogram frames (10 ms each) per token.
        seconds: the most that is read of a sound.
    """

    def __init__(self, trunk: Trunk, rate: int = 16_000, bands: int = 64, frames: int = 8, seconds: float = 4.0) -> None:
        super().__init__(AudioReader(rate, bands, frames, seconds), trunk)


def log_mel(wave: Tensor, rate: int, bands: int) -> Tensor:
    """(T,) samples -> (frames, bands) natural log of mel power, floored at 1e-5; one frame per 10 ms, 25 ms Hann windows."""
    window, hop = int(WINDOW * rate), int(HOP * rate)
    size = 2 ** math.ceil(math.log2(window))
    wave = F.pad(wave, (0, max(0, size - len(wave))))
    spectrum = torch.stft(wave, size, hop, window, torch.hann_window(window), center=True, return_complex=True, pad_mode="constant")
    return (spectrum.abs().square().T @ mel_bank(rate, size, bands)).clamp(min=1e-5).log()


@lru_cache(maxsize=8)
def mel_bank(rate: int, size: int, bands: int) -> Tensor:
    """Triangular filters, (size // 2 + 1, bands), evenly spaced on the HTK mel scale 2595 log10(1 + f / 700) to rate / 2."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corner = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)[:, None]
    rise = (frequency - corner[:-2]) / (corner[1:-1] - corner[:-2])
    fall = (corner[2:] - frequency) / (corner[2:] - corner[1:-1])
    return torch.minimum(rise, fall).clamp(min=0).float()


def resample(wave: Tensor, source: int, target: int, zeros: int = 16) -> Tensor:
    """Band-limited resampling of (T,) by a windowed-sinc filter bank; length ceil(T * target / source).

    One filter per output phase (Smith 2002, "Digital audio resampling"); `zeros` zero crossings on each side.
    """
    if source == target:
        return wave
    common = math.gcd(source, target)
    down, up = source // common, target // common
    cutoff = 0.95 * min(1.0, up / down)  # in units of the source's Nyquist frequency
    reach = math.ceil(zeros / cutoff)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    time = torch.arange(-reach, down + reach, dtype=torch.float64)[None] - phase
    kernel = cutoff * torch.sinc(cutoff * time) * torch.cos(math.pi * time / 2 / (reach + 1)).clamp(min=0) ** 2
    kernel = torch.where(time.abs() <= reach, kernel, 0.0).float()
    padded = F.pad(wave[None, None], (reach, reach + down))
    y = F.conv1d(padded, kernel[:, None], stride=down)[0].T.reshape(-1)
    return y[: math.ceil(len(wave) * up / down)]
