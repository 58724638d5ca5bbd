import io
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headwater.datamodules.collate import collate
from headwater.modalities.audio import AudioReader, log_mel, mel_bank, resample


def sine(pitch, rate, seconds=0.5):
    return torch.sin(2 * math.pi * pitch * torch.arange(int(rate * seconds), dtype=torch.float64) / rate + 0.3).float()


def test_log_mel_equals_the_formula_with_loops():
    rate, bands = 2000, 5
    wave = torch.randn(300, generator=torch.Generator().manual_seed(0))
    window, hop, size = 50, 20, 64
    centred = np.pad(wave.double().numpy(), size // 2)
    hann = np.zeros(size)
    hann[(size - window) // 2 : (size - window) // 2 + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    power = np.stack([np.abs(np.fft.rfft(centred[i : i + size] * hann)) ** 2 for i in range(0, len(wave) + 1, hop)])
    corner = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), bands + 2)]
    mel = np.zeros((len(power), bands))
    for band in range(bands):
        low, middle, high = corner[band : band + 3]
        for k in range(size // 2 + 1):
            f = k * rate / size
            mel[:, band] += power[:, k] * max(0, min((f - low) / (middle - low), (high - f) / (high - middle)))
    assert_close(log_mel(wave, rate, bands).double(), torch.from_numpy(np.log(np.maximum(mel, 1e-5))), rtol=1e-4, atol=1e-4)


def test_mel_filters_are_htk_triangles_as_in_torchaudio():
    bank = mel_bank(16000, 512, 40)
    assert (bank >= 0).all()
    assert (bank.amax(0) <= 1).all()
    assert (bank.amax(0) > 0).all()
    assert (bank.argmax(0).diff() >= 0).all()


@pytest.mark.parametrize(("source", "target"), [(48000, 16000), (44100, 16000), (8000, 16000), (22050, 16000), (16000, 11025)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_resampling_keeps_a_tone_below_the_cutoff(source, target, share):
    pitch = share * min(source, target) / 2
    got, expected = resample(sine(pitch, source), source, target), sine(pitch, target)
    assert len(got) == math.ceil(source // 2 * target / source)
    inner = slice(200, min(len(got), len(expected)) - 200)  # the edges meet silence
    assert (got[inner] - expected[inner]).abs().max() < 5e-3


@pytest.mark.parametrize("pitch", [9000, 12000, 20000])
def test_resampling_kills_what_would_alias(pitch):
    assert resample(sine(pitch, 48000), 48000, 16000)[200:-200].abs().max() < 5e-3


@pytest.mark.parametrize("n", [1, 7, 441, 1000])
def test_resampled_lengths_are_rounded_up(n):
    assert len(resample(torch.randn(n), 44100, 16000)) == math.ceil(n * 16000 / 44100)
    assert len(resample(torch.randn(n), 16000, 44100)) == math.ceil(n * 44100 / 16000)


def test_a_tone_lands_in_its_band_whatever_the_rate_of_the_file():
    reader = AudioReader(bands=32, frames=1)
    mels = [reader.tokens((sine(1000, rate), rate)).x.float()[10:-10].mean(0) for rate in (16000, 44100)]
    assert mels[0].argmax() == mels[1].argmax() == mel_bank(16000, 512, 32)[32].argmax()  # bin 32 of 512 is 1000 Hz
    assert_close(mels[0].max(), mels[1].max(), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_files_become_mono_at_their_own_rate(kind):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    stereo = torch.stack([sine(300, 8000), 0 * sine(300, 8000)], 1).numpy()
    soundfile.write(file, stereo, 8000, format=kind)
    wave, rate = AudioReader().decode({kind: file.getvalue()})
    assert rate == 8000
    assert_close(wave, sine(300, 8000) / 2, rtol=0, atol=1e-4)


def test_silent_and_empty_files_are_refused():
    soundfile = pytest.importorskip("soundfile")
    for wave, reason in ((np.zeros(100), "zero"), (np.zeros(0), "no samples")):
        file = io.BytesIO()
        soundfile.write(file, wave, 8000, format="wav")
        with pytest.raises(ValueError, match=reason):
            AudioReader().decode({"wav": file.getvalue()})


def test_the_number_of_tokens_follows_the_length_up_to_the_limit():
    reader = AudioReader(bands=8, frames=4, seconds=1.0)
    assert [len(reader.tokens(torch.ones(n)).x) for n in (10, 16000, 160000)] == [1, 26, 26]  # 1 + n / 160 frames, 4 per token
    t = reader.tokens(torch.ones(5000))
    assert t.position[:, 0].tolist() == list(range(len(t.x)))


def test_restore_gives_the_spectrogram():
    reader = AudioReader(bands=8, frames=4)
    wave = sine(440, 16000, 0.3)
    t = reader.prepare(collate([{"a": reader.tokens(wave)}, {"a": reader.tokens(sine(440, 16000, 0.6))}], ["a"])["a"])
    mel = log_mel(wave, 16000, 8)
    restored = torch.from_numpy(reader.restore(t))
    assert len(restored) == 4 * math.ceil(len(mel) / 4)
    assert_close(restored[: len(mel)], mel, rtol=2e-3, atol=5e-3)  # tokens travel as float16


def test_a_view_is_a_function_of_its_seed():
    reader = AudioReader(bands=8, frames=4)
    a, again, other = (reader.tokens(sine(440, 16000), torch.tensor(s)).x for s in (1, 1, 2))
    assert torch.equal(a, again)
    assert a.shape != other.shape or not torch.equal(a, other)
