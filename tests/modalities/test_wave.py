import io
import math
import tarfile

import numpy as np
import pytest
import torch
from learning import descend
from torch.testing import assert_close

from headwater.datamodules.collate import collate
from headwater.embedded import place
from headwater.modalities import Wave
from headwater.modalities.wave import WaveReader, receptive
from headwater.model import Model
from headwater.objectives import Masked
from headwater.trunk import Trunk
from headwater.view import View


def sounds(shard, count):
    """The first sounds of an embedded shard, as files."""
    with tarfile.open(place(f"embedded:{shard}-000.tar")) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith("ogg")][:count]


def sine(count, rate=16000, pitch=300.0):
    return torch.sin(2 * math.pi * pitch * torch.arange(count) / rate)


def small(**options):
    torch.manual_seed(0)
    return Wave(Trunk(32, 2), channels=32, **options)


def peer(**options):
    """The convolutional front of wav2vec 2.0 in transformers, and its projection."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder, Wav2Vec2FeatureProjection

    config = transformers.Wav2Vec2Config(conv_dim=[32] * 7, conv_bias=True, hidden_size=32, feat_proj_dropout=0.0, **options)
    return Wav2Vec2FeatureEncoder(config).eval(), Wav2Vec2FeatureProjection(config).eval()


def test_windows_equal_the_convolution_of_the_whole_sound():
    """Window by window on real speech is what transformers computes over the whole, projection included."""
    encoder, (front, projection) = small(), peer(feat_extract_norm="layer")
    with torch.no_grad():
        for parameter in [*front.parameters(), *projection.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    encoder.stem.load_state_dict(front.state_dict() | projection.state_dict())
    for content in sounds("speech-train", 3):
        t = encoder.reader.tokens(encoder.reader.decode({"ogg": content}))
        ready = encoder.reader.prepare(t.map(lambda field: field[None]))
        wave = torch.from_numpy(encoder.reader.restore(ready))
        with torch.no_grad():
            expected = projection(front(wave[None]).transpose(1, 2))[0]
            assert_close(encoder.embed(ready).x, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_over_time_would_mix_tokens():
    """Why "group" is not offered: the last sample changes the first frame."""
    front, _ = peer(feat_extract_norm="group")
    wave = sine(4000)[None]
    other = wave.clone()
    other[0, -1] += 10
    with torch.no_grad():
        assert (front(wave) - front(other))[0, :, 0].abs().max() > 1e-5


def test_the_receptive_field_is_that_of_the_stack():
    assert receptive((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)) == (400, 320)
    for kernels, strides in (((5, 3), (2, 4)), ((4,), (3,)), ((3, 3, 2), (1, 2, 2))):
        window, stride = receptive(kernels, strides)
        for extra in (0, stride - 1, stride, 3 * stride):
            y = torch.zeros(1, 1, window + extra)
            for kernel, step in zip(kernels, strides, strict=True):
                y = torch.nn.functional.conv1d(y, torch.ones(1, 1, kernel), stride=step)
            assert y.shape[-1] == WaveReader(100, window, stride).count(window + extra)
    for kernels, strides in (((), ()), ((3, 3), (2,)), ((0,), (1,))):
        with pytest.raises(ValueError, match="as many of both"):
            receptive(kernels, strides)


def test_sounds_have_mean_zero_and_deviation_one_as_in_transformers():
    extractor = pytest.importorskip("transformers").Wav2Vec2FeatureExtractor(do_normalize=True)
    reader = WaveReader()
    for content in sounds("sounds-train", 4):
        signal = reader.decode({"ogg": content})
        wave = reader.wave(signal)
        expected = torch.from_numpy(extractor(wave.numpy(), sampling_rate=16000).input_values[0])
        assert_close(reader.tokens(signal).x, expected.unfold(0, 400, 320).half(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_the_length_is_known_from_the_seconds_and_a_view_does_not_change_it(rate):
    reader = WaveReader(seconds=1.0)
    for count in (1, 100, rate // 40, rate // 3, rate, 3 * rate):
        signal = (sine(count, rate), rate)
        facts = {"size": 1, "seconds": float(np.float32(count / rate))}
        assert reader.length(facts) == len(reader.tokens(signal).x) == len(reader.tokens(signal, View(seed=1)).x)
    assert reader.length({"size": 1}) is None


def test_the_length_of_embedded_sounds_is_exact():
    soundfile = pytest.importorskip("soundfile")
    reader = WaveReader()
    for content in sounds("sounds-test", 33):
        info = soundfile.info(io.BytesIO(content))
        t = reader.tokens(reader.decode({"ogg": content}))
        assert reader.length({"size": 1, "seconds": info.frames / info.samplerate}) == len(t.x)
        assert t.position[:, 0].tolist() == list(range(len(t.x)))


def test_restore_gives_the_samples_whatever_the_padding():
    reader = WaveReader()
    wave = sine(400 + 320 * 9)
    t = reader.prepare(collate([{"a": reader.tokens(wave)}, {"a": reader.tokens(sine(16000))}], ["a"])["a"])
    assert_close(torch.from_numpy(reader.restore(t)), (wave - wave.mean()) / wave.std(correction=0), rtol=0, atol=2e-3)


def test_a_short_sound_is_one_window_with_silence_behind():
    t = WaveReader().tokens(sine(100))
    assert t.x.shape == (1, 400)
    assert (t.x[0, 100:] == 0).all()


def test_unusable_sounds_and_options_are_refused():
    for wrong, reason in ((torch.tensor([0.0, math.nan]), "finite"), (torch.zeros(2, 8), "samples"), (torch.zeros(0), "samples")):
        with pytest.raises(ValueError, match=reason):
            WaveReader().tokens(wrong)
    with pytest.raises(ValueError, match="stride"):
        WaveReader(window=100, stride=200)


def test_masked_prediction_learns_real_sounds():
    """Half of the windows of eight sounds are hidden, always the same ones. Answering zero costs 1: the variance of a sound."""
    torch.manual_seed(0)
    encoder = Wave(Trunk(64, 2), rate=4000, seconds=0.5, channels=64, kernels=(10, 4, 4), strides=(5, 4, 4))
    reader, model = encoder.reader, Model({"audio": encoder})
    samples = [{"audio": reader.tokens(reader.decode({"ogg": content}))} for content in sounds("sounds-train", 8)]
    batch = {"audio": reader.prepare(collate(samples, ["audio"])["audio"])}
    losses = descend(model, Masked(model, modality="audio", ratio=0.5), batch, steps=120, again=True)
    assert losses[0] > 0.9
    assert losses[-1] < 0.6
