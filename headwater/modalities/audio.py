"""Sound as patches of a log-mel spectrogram, made here in torch: no torchaudio."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.modalities import decoding
from headwater.modalities.image import grid
from headwater.modalities.sounds import Sound
from headwater.model import Encoder, Reader
from headwater.tokens import Tokens
from headwater.trunk import Trunk

WINDOW, HOP = 0.025, 0.010  # seconds, the field's usual frame
ZEROS, BAND = 16, 0.95  # the resampler's zero crossings on each side, and the share of the band that it keeps


class AudioReader(Reader):
    """A sound file of any rate and channel count -> mono at `rate` -> log-mel frames -> patches of `frames` x all bands.

    Position: (patch number in time, 0). The signal is (samples (T,) float32 in [-1, 1], rate in Hz), or an open Sound.
    A random view changes loudness. Of a sound longer than `seconds` it takes a random part, where the plain signal is the
    first one. Another sound it shifts by up to a tenth of a second; what that pushes behind its last patch is cut off. Only
    the samples that are taken are decoded.

    Args:
        rate: samples per second; other rates are resampled.
        bands: mel bands.
        frames: spectrogram frames (10 ms each) per token.
        seconds: the most that is read of a sound.
        soundtrack: read the sound of video files too, where a sample has no sound file.
    """

    extensions: ClassVar[tuple[str, ...]] = ("wav", "flac", "ogg", "mp3", "opus", "m4a", "aac")

    def __init__(
        self, rate: int = 16_000, bands: int = 64, frames: int = 8, seconds: float = 4.0, soundtrack: bool = False
    ) -> None:
        self.rate, self.bands, self.frames, self.seconds = rate, bands, frames, seconds
        self.features = bands * frames
        if soundtrack:
            self.extensions = (*type(self).extensions, "mp4", "webm", "mkv", "mov", "avi")  # type: ignore[misc]

    def decode(self, members: dict[str, bytes]) -> tuple[Tensor, int] | Sound:
        """All samples of a short sound; a longer one stays in its file until `tokens` knows which part is wanted."""
        sound = decoding.open_sound(members[str(self.member(members))])
        if sound.count > self.seconds * sound.rate:
            return sound
        return torch.from_numpy(heard(sound, 0, sound.count)), sound.rate

    def tokens(self, signal: Any, view: Tensor | None = None) -> Tokens:
        sound = signal if isinstance(signal, Sound) else Samples(*(signal if isinstance(signal, tuple) else (signal, self.rate)))
        wanted = math.ceil(self.seconds * sound.rate)
        longer = max(0, sound.count - wanted)
        first = int(random.uniform(view, (1,), "start") * (longer + 1)) if longer and view is not None else 0
        read = wanted + reach(sound.rate, self.rate)  # the resampler looks ahead
        piece = heard(sound, first, read) if sound is signal else sound.read(first, read)
        wave = resample(torch.from_numpy(piece), sound.rate, self.rate)[: int(self.seconds * self.rate)]
        count = self._count(len(wave))
        if view is not None:
            gain, shift = random.uniform(view, (2,), "audio").tolist()
            wave = F.pad(wave * 2 ** (2 * gain - 1), (0 if longer else round(shift * 0.1 * self.rate), 0))
        mel = log_mel(wave, self.rate, self.bands)[: count * self.frames]
        mel = F.pad(mel, (0, 0, 0, -len(mel) % self.frames), value=math.log(1e-5))
        return Tokens(rearrange(mel, "(n t) f -> n (t f)", t=self.frames).to(torch.float16), grid(count, 1))

    def _count(self, samples: int) -> int:
        """Tokens of so many samples at `rate`."""
        _, hop, size = frame(self.rate)
        return math.ceil((1 + max(samples, size) // hop) / self.frames)

    def length(self, facts: dict[str, float]) -> int | None:
        """From "seconds"."""
        if "seconds" not in facts:
            return None
        samples = math.ceil(facts["seconds"] * self.rate * (1 - 1e-7))  # hints are float32
        return self._count(min(samples, int(self.seconds * self.rate)))

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
        soundtrack: read the sound of video files too, where a sample has no sound file.
    """

    def __init__(
        self,
        trunk: Trunk,
        rate: int = 16_000,
        bands: int = 64,
        frames: int = 8,
        seconds: float = 4.0,
        soundtrack: bool = False,
    ) -> None:
        super().__init__(AudioReader(rate, bands, frames, seconds, soundtrack), trunk)


class Samples(Sound):
    """A sound that is in memory: samples (T,) in [-1, 1] and their rate in Hz."""

    def __init__(self, wave: Any, rate: int) -> None:
        self._wave, self.rate = np.require(wave, np.float32, ["W"]), rate
        self.count = self._wave.size
        if self._wave.ndim != 1 or not self.count:
            raise ValueError(f"found a sound of shape {self._wave.shape}; expected samples (T,), at least one")

    def read(self, start: int, count: int) -> np.ndarray:
        return self._wave[start : start + count]


def heard(sound: Sound, start: int, count: int) -> np.ndarray:
    """A part of a file, float32 (T,). ValueError when there is nothing to hear in the whole file, or no number."""
    wave = sound.read(start, count)
    if not len(wave):
        raise ValueError("the sound has no samples")
    if not np.isfinite(wave).all():
        raise ValueError("the sound holds samples that are no finite numbers")
    if not wave.any() and not any(sound.read(at, sound.rate).any() for at in range(0, sound.count, sound.rate)):
        raise ValueError("the sound is all zero; a recorder or simulator without an audio device writes that")
    return wave


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


def resample(wave: Tensor, source: int, target: int) -> Tensor:
    """Band-limited resampling of (T,) by a windowed-sinc filter bank; length ceil(T * target / source).

    One filter per output phase (Smith 2002, "Digital audio resampling").
    """
    if source == target:
        return wave
    common = math.gcd(source, target)
    down, up = source // common, target // common
    ahead = reach(down, up)
    padded = F.pad(wave[None, None], (ahead, ahead + down))
    y = F.conv1d(padded, sinc_bank(down, up), stride=down)[0].T.reshape(-1)
    return y[: math.ceil(len(wave) * up / down)]


def reach(source: int, target: int) -> int:
    """Samples of the source on each side that the resampler looks at for one of the target."""
    return math.ceil(ZEROS / (BAND * min(1.0, target / source)))


@lru_cache(maxsize=64)
def sinc_bank(down: int, up: int) -> Tensor:
    """The filter of each of the `up` phases, (up, 1, down + 2 * reach)."""
    cutoff = BAND * min(1.0, up / down)  # in units of the source's Nyquist frequency
    ahead = reach(down, up)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    time = torch.arange(-ahead, down + ahead, dtype=torch.float64)[None] - phase
    kernel = cutoff * torch.sinc(cutoff * time) * torch.cos(math.pi * time / 2 / (ahead + 1)).clamp(min=0) ** 2
    return torch.where(time.abs() <= ahead, kernel, 0.0).float()[:, None]
