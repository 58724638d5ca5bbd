"""Sound as windows of raw samples behind a convolutional front (wav2vec 2.0, HuBERT)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwater import random
from headwater.init import INPUT, Rule, initialise
from headwater.modalities.image import grid
from headwater.modalities.sound_reader import SoundReader
from headwater.model import Encoder
from headwater.pooling import Pooling
from headwater.tokens import Tokens
from headwater.trunk import Trunk
from headwater.view import View

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # of wav2vec 2.0: 400 samples every 320


class WaveReader(SoundReader):
    """A sound -> windows of `window` samples, one every `stride`; what fills no window is left out.

    Position: (number of the window). Signals and random views are those of SoundReader.

    Args:
        rate: samples per second; other rates are resampled.
        window: samples per token; a shorter sound is filled up with silence.
        stride: samples between the beginnings of two windows, at most `window`.
        seconds: the most that is read of a sound.
        soundtrack: read the sound of video files too, where a sample has no sound file.
        normalize: give every sound mean 0 and deviation 1, so that loudness is not kept, as in the training of wav2vec 2.0 and
            HuBERT. WavLM base was trained without.
    """

    def __init__(
        self,
        rate: int = 16_000,
        window: int = 400,
        stride: int = 320,
        seconds: float = 4.0,
        soundtrack: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__(rate, seconds, soundtrack)
        if not 0 < stride <= window:
            raise ValueError(f"found windows of {window} samples every {stride}; expected a stride from 1 to the window")
        self.window, self.stride, self.normalize, self.features = window, stride, normalize, window

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        wave = self.wave(signal, view)
        if self.normalize:
            wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
        wave = F.pad(wave, (0, max(0, self.window - len(wave))))
        windows = wave.unfold(0, self.window, self.stride)
        return Tokens(windows.to(torch.float16) if self.normalize else windows.contiguous(), grid(len(windows)))

    def count(self, samples: int) -> int:
        return 1 + max(0, samples - self.window) // self.stride

    def prepare(self, t: Tokens) -> Tokens:
        return t._replace(x=t.x.to(torch.float32))

    def blank(self) -> Tokens:
        return self.canvas(grid(self.count(round(self.seconds * self.rate))))

    def restore(self, t: Tokens) -> np.ndarray:
        """The samples (T,), normalised or not; of two windows over the same samples the later one is heard."""
        x = t.x[0][t.real()[0]]
        return torch.cat([x[:, : self.stride].flatten(), x[-1, self.stride :]]).float().cpu().numpy()

    def example(self, n: int, seed: int) -> list[Tokens]:
        """Sounds that fill their windows, so that nothing is left out."""
        longest = self.window + 6 * self.stride
        noise = random.normal(torch.tensor(seed), (n, longest), "wave")
        return [self.tokens(x[: longest - k % 4 * self.stride]) for k, x in enumerate(noise)]


class Wave(Encoder):
    """A transformer over frames of raw samples, each the answer of a stack of convolutions to its own receptive field.

    The window of a token is what one output of the stack sees, so the windows together give exactly the convolution of the
    whole sound, and tokens do not mix before the trunk. Norms are over the channels of each moment ("layer" in transformers).
    The norm over time of the base models of wav2vec 2.0 and HuBERT ("group") makes every frame depend on all others, so that
    nothing could be hidden from the encoder; it is not offered. Nor is their convolution over time for positions: the trunk has
    its own.

    Args:
        trunk: the transformer.
        rate: samples per second; other rates are resampled.
        seconds: the most that is read of a sound.
        soundtrack: read the sound of video files too, where a sample has no sound file.
        channels: of every convolution.
        kernels, strides: of the convolutions, from the samples on; by default one token per 20 ms at 16 kHz.
        pooling: see Encoder.
    """

    def __init__(
        self,
        trunk: Trunk,
        rate: int = 16_000,
        seconds: float = 4.0,
        soundtrack: bool = False,
        channels: int = 512,
        kernels: Sequence[int] = KERNELS,
        strides: Sequence[int] = STRIDES,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(WaveReader(rate, *receptive(kernels, strides), seconds, soundtrack), trunk, pooling)
        self.stem = Front(channels, kernels, strides, trunk.width)


class Front(nn.Module):
    """Convolutions without padding, each with a norm over its channels and GELU, then a norm and a projection.

    Parameter names are those of Wav2Vec2FeatureEncoder and Wav2Vec2FeatureProjection in transformers. Baevski et al. 2020,
    arXiv:2006.11477; Hsu et al. 2021, arXiv:2106.07447.
    """

    def __init__(self, channels: int, kernels: Sequence[int], strides: Sequence[int], width: int) -> None:
        super().__init__()
        layers = zip((1, *[channels] * len(kernels)), kernels, strides, strict=False)
        self.conv_layers = nn.ModuleList(Convolution(source, channels, kernel, stride) for source, kernel, stride in layers)
        self.layer_norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, width)
        initialise(self)

    def init_rules(self) -> dict[str, Rule]:
        return {"conv_layers.0.conv.weight": INPUT}

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, window) -> (B, N, width)."""
        y = x.reshape(-1, 1, x.shape[-1])
        for layer in self.conv_layers:
            y = layer(y)
        return self.projection(self.layer_norm(y[..., 0])).unflatten(0, x.shape[:2])


class Convolution(nn.Module):
    """conv, norm over channels, GELU: (B, C, T) -> (B, channels, fewer)."""

    def __init__(self, source: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(source, channels, kernel, stride)
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x).transpose(1, 2)).transpose(1, 2))


def receptive(kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Samples that one output of a stack of convolutions sees, and samples between two outputs."""
    if not kernels or len(kernels) != len(strides) or min(*kernels, *strides) < 1:
        raise ValueError(f"found kernels {list(kernels)} and strides {list(strides)}; expected as many of both, 1 or more each")
    window = 1 + sum((kernel - 1) * prod(strides[:layer]) for layer, kernel in enumerate(kernels))
    return window, prod(strides)
