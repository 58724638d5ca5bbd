"""Towers of sound of Hugging Face transformers as encoders: raw waves (wav2vec 2.0, HuBERT, WavLM) and Whisper's encoder."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater.modalities.image import grid
from headwater.modalities.sound_reader import SoundReader
from headwater.modalities.tower import Tower, by_sample, require
from headwater.modalities.transformers_models import config_of, facts_of, library, model_of
from headwater.modalities.wave import WaveReader, receptive
from headwater.tokens import Tokens, attention_mask
from headwater.view import View

WAVES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
RATE, HOP = 16_000, 160  # of Whisper


class TransformersWave(Tower):
    """wav2vec 2.0, HuBERT or WavLM on raw waves, one token per output of its convolutions (20 ms).

    A raw token is the window of samples that one output sees, so N in = N out. Where the convolutions are normalised over
    channels ("layer") every window is embedded by itself. Where the first one is normalised over time ("group", the base
    models) the windows are laid together again and each sample runs through the convolutions as a whole: its tokens then know
    the mean and deviation of the sample, and nothing else of one another. Up to 19 ms at the end that fill no window are cut
    off. The library's masking of spans is left to objectives.

    The transformer's positions are a convolution over time, so it takes no subsets and cannot be causal.

    Args:
        name: a name on the hub, or a folder with config.json and perhaps weights and preprocessor_config.json.
        pretrained: load its weights; otherwise they are drawn anew from the config.
        seconds: the most that is read of a sound.
        config, normalize: what was found in `name`; set by an export.
    """

    maskable = False

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        seconds: float = 15.0,
        config: dict[str, Any] | None = None,
        normalize: bool | None = None,
    ) -> None:
        found = config_of(name, config)
        model = model_of("AutoModel", name, found, pretrained, ("masked_spec_embed", "adapter"))
        model.masked_spec_embed = model.adapter = None  # not used here: spans are hidden by objectives, nothing is subsampled
        normalize = normalizes(name) if normalize is None else normalize
        reader = WaveReader(RATE, *receptive(found.conv_kernel, found.conv_stride), seconds, normalize=normalize)
        super().__init__(reader, found.hidden_size, found.hidden_size)
        self.tower, self.whole = model, found.feat_extract_norm == "group"
        self.pointwise = not self.whole
        self.spec["init_args"] |= {"pretrained": False, "config": facts_of(found), "normalize": normalize}

    def embed(self, raw: Tokens) -> Tokens:
        """The convolutions and the projection behind them: (B, N, window) -> (B, N, D)."""
        x = by_sample(raw, self._whole).x if self.whole else self._front(raw.x.flatten(0, 1)).reshape(*raw.x.shape[:2], -1)
        made = self.tower.feature_projection(x)
        return raw._replace(x=made[0] if isinstance(made, tuple) else made)

    def _front(self, waves: Tensor) -> Tensor:
        """(B, T) -> (B, outputs, C)."""
        return self.tower.feature_extractor(waves).mT

    def _whole(self, t: Tokens) -> Tokens:
        """Rows of one sample each; those of one length run together."""
        stride, length = self.reader.stride, t.real().sum(1)  # type: ignore[attr-defined]
        waves = torch.cat([t.x[:, :, :stride].flatten(1), t.x[:, -1, stride:]], 1)
        x = waves.new_zeros(*t.x.shape[:2], self.tower.config.conv_dim[-1])
        for n in (int(n) for n in length.unique() if n):
            rows = (length == n).nonzero()[:, 0]
            wave = torch.cat([waves[rows, : n * stride], t.x[rows, n - 1, stride:]], 1)
            x = x.index_put((rows[:, None], torch.arange(n, device=x.device)), self._front(wave))
        return t._replace(x=x)

    def contextual(self, t: Tokens, causal: bool) -> Tokens:
        if causal:
            raise ValueError(f"{type(self).__name__} cannot be causal: its positions are a convolution that sees what comes later")
        require(self, t, "counts places itself")
        real = t.real()
        real = real | ~real.any(1, keepdim=True)  # WavLM's gradient is NaN where a row has nothing to look at
        return t._replace(x=self.tower.encoder(t.x.clone(), attention_mask=real).last_hidden_state)


class WhisperReader(SoundReader):
    """A sound -> the log-mel frames of Whisper's own feature extractor, padded with silence to `seconds`, two frames per token.

    All tokens are real, those of the silence too: Whisper was trained to look at 30 s and takes no mask. Its level depends on
    the loudest moment of those 30 s. Position: (number of the token), 20 ms each. Radford et al. 2022, arXiv:2212.04356.

    Args:
        bands: mel bands.
        seconds: length of every signal.
    """

    def __init__(self, bands: int = 80, seconds: float = 30.0) -> None:
        super().__init__(RATE, seconds)
        self.bands, self.features = bands, 2 * bands

    @cached_property
    def _extractor(self) -> Any:
        return library("Whisper").WhisperFeatureExtractor(feature_size=self.bands, chunk_length=int(self.seconds))

    def tokens(self, signal: Any, view: View | None = None) -> Tokens:
        wave = self.wave(signal, view)
        mel = self._extractor(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
        return Tokens(rearrange(mel, "f (n t) -> n (t f)", t=2), grid(self.count(0)))

    def count(self, samples: int) -> int:
        return int(self.seconds) * RATE // HOP // 2

    def length(self, facts: dict[str, float]) -> int | None:
        return self.count(0)

    def restore(self, t: Tokens) -> Any:
        """The log-mel frames (frames, bands); a waveform needs a vocoder."""
        return rearrange(t.x[0], "n (t f) -> (n t) f", t=2).cpu().numpy()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_extractor"}


class TransformersWhisper(Tower):
    """Whisper's encoder; its decoder is left out.

    Embedding is its two convolutions, where every token sees two frames to the left and two to the right, and its positions.
    The transformer behind it takes subsets and can be made causal. Pooled is the mean over all 30 s, as for a global feature.

    Args:
        name: a name on the hub, or a folder with config.json and perhaps weights.
        pretrained: load its weights; otherwise they are drawn anew from the config.
        config: what was found in `name`; set by an export.
    """

    pointwise = False

    def __init__(self, name: str, pretrained: bool = False, config: dict[str, Any] | None = None) -> None:
        found = config_of(name, config)
        seconds = found.max_source_positions * 2 * HOP / RATE
        if seconds != int(seconds):
            raise ValueError(f"found a Whisper of {seconds} s; expected whole seconds, as its feature extractor makes")
        super().__init__(WhisperReader(found.num_mel_bins, seconds), found.d_model, found.d_model)
        self.tower = model_of("AutoModel", name, found, pretrained, ("decoder",)).get_encoder()
        self.spec["init_args"] |= {"pretrained": False, "config": facts_of(found)}

    def embed(self, raw: Tokens) -> Tokens:
        made = by_sample(raw, self._front)
        return made._replace(x=made.x + self.tower.embed_positions(raw.position[..., 0].long()))

    def _front(self, t: Tokens) -> Tokens:
        x = rearrange(t.x, "b n (t f) -> b f (n t)", t=2)
        return t._replace(x=F.gelu(self.tower.conv2(F.gelu(self.tower.conv1(x)))).mT)

    def contextual(self, t: Tokens, causal: bool) -> Tokens:
        t = t if not causal else t._replace(valid=t.real())
        see = attention_mask(t, t, causal).dense
        if see is not None:
            see = t.x.new_zeros(see.shape).masked_fill(~see, torch.finfo(t.x.dtype).min).expand(-1, -1, t.x.shape[1], -1)
        x = F.dropout(t.x, self.tower.dropout, self.training)
        for layer in self.tower.layers:
            made = layer(x, see)
            x = made[0] if isinstance(made, tuple) else made
        return t._replace(x=self.tower.layer_norm(x))


def normalizes(name: str) -> bool:
    """Whether a tower was trained on waves of mean 0 and deviation 1; True where its folder does not say."""
    path = os.path.expanduser(name)
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "preprocessor_config.json")):
        return True
    return bool(library(f"transformers/{name}").AutoFeatureExtractor.from_pretrained(path).do_normalize)
