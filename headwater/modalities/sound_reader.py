"""From any sound file to mono samples at one rate: what all readers of sound share. Resampled here: no torchaudio."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from headwater import random
from headwater.modalities import decoding
from headwater.modalities.sounds import Sound
from headwater.model import Reader
from headwater.tokens import Tokens
from headwater.view import View

ZEROS, BAND = 16, 0.95  # the resampler's zero crossings on each side, and the share of the band that it keeps


class SoundReader(Reader):
    """A sound file of any rate and channel count -> mono at `rate`; a subclass cuts that into tokens.

    The signal is (samples (T,) float32 in [-1, 1], rate in Hz), or samples alone at `rate`, or an open Sound. A random view
    changes loudness. Of a sound longer than `seconds` it takes a random part, where the plain signal is the first one. Another
    sound it shifts by up to a tenth of a second; what that pushes behind its end is cut off. Only the samples that are taken
    are decoded.

    Args:
        rate: samples per second; other rates are resampled.
        seconds: the most that is read of a sound.
        soundtrack: read the sound of video files too, where a sample has no sound file.
    """

    extensions: ClassVar[tuple[str, ...]] = ("wav", "flac", "ogg", "mp3", "opus", "m4a", "aac")

    def __init__(self, rate: int = 16_000, seconds: float = 4.0, soundtrack: bool = False) -> None:
        self.rate, self.seconds = rate, seconds
        if soundtrack:
            self.extensions = (*type(self).extensions, "mp4", "webm", "mkv", "mov", "avi")  # type: ignore[misc]

    def count(self, samples: int) -> int:
        """Tokens of so many samples at `rate`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its tokens")

    def decode(self, members: dict[str, bytes]) -> tuple[Tensor, int] | Sound:
        """All samples of a short sound; a longer one stays in its file until `tokens` knows which part is wanted."""
        sound = decoding.open_sound(members[str(self.member(members))])
        if sound.count > self.seconds * sound.rate:
            return sound
        return torch.from_numpy(heard(sound, 0, sound.count)), sound.rate

    def wave(self, signal: Any, view: View | None = None) -> Tensor:
        """The part of a signal that is read, (T,) float32 at `rate`."""
        sound = signal if isinstance(signal, Sound) else Samples(*(signal if isinstance(signal, tuple) else (signal, self.rate)))
        wanted = math.ceil(self.seconds * sound.rate)
        longer = max(0, sound.count - wanted)
        first = int(view.uniform((1,), "start") * (longer + 1)) if longer and view is not None else 0
        read = wanted + reach(sound.rate, self.rate)  # the resampler looks ahead
        piece = heard(sound, first, read) if sound is signal else sound.read(first, read)
        wave = resample(torch.from_numpy(piece), sound.rate, self.rate)[: int(self.seconds * self.rate)]
        if view is None:
            return wave
        gain, shift = view.uniform((2,), "audio").tolist()
        silence = 0 if longer else round(shift * 0.1 * self.rate)
        wave = F.pad(wave * 2 ** (2 * gain - 1), (silence, 0))[: len(wave)]
        share, late, noise = view.uniform((3,), "part").tolist()
        count = max(1, round(view.part(share, (1.0, 1.0)) * len(wave)))
        wave = wave[round(late * (len(wave) - count)) :][:count]
        if not view.strength:
            return wave
        hiss = random.normal(torch.tensor(view.seed), (count,), "noise")
        return wave + hiss * wave.std(correction=0) * 0.3 * view.strength * noise

    def length(self, facts: dict[str, float]) -> int | None:
        """From "seconds"."""
        if "seconds" not in facts:
            return None
        samples = math.ceil(facts["seconds"] * self.rate * (1 - 1e-7))  # hints are float32
        return self.count(min(samples, int(self.seconds * self.rate)))

    def example(self, n: int, seed: int) -> list[Tokens]:
        pitch = 200 + 600 * random.uniform(torch.tensor(seed), (n,), "audio")
        return [
            self.tokens(torch.sin(2 * math.pi * p * torch.arange(int(self.rate * (0.2 + 0.1 * (k % 3)))) / self.rate))
            for k, p in enumerate(pitch.tolist())
        ]


class Samples(Sound):
    """A sound that is in memory: samples (T,) in [-1, 1] and their rate in Hz."""

    def __init__(self, wave: Any, rate: int) -> None:
        self._wave, self.rate = np.require(wave, np.float32, ["W"]), rate
        self.count = self._wave.size
        if self._wave.ndim != 1 or not self.count:
            raise ValueError(f"found a sound of shape {self._wave.shape}; expected samples (T,), at least one")
        if not np.isfinite(self._wave).all():
            raise ValueError("the sound holds samples that are no finite numbers")

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
