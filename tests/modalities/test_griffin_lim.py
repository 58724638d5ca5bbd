import tarfile

import pytest
import torch

from headwater.embedded import place
from headwater.modalities.audio import AudioReader, frame, log_mel, mel_bank
from headwater.modalities.griffin_lim import griffin_lim, linear


@pytest.fixture(scope="module")
def words():
    """Three spoken titles."""
    reader, found = AudioReader(), []
    with tarfile.open(place("embedded:speech-train-000.tar")) as tar:
        for name in [n for n in tar.getnames() if n.endswith(".ogg")][:3]:
            found.append(reader.wave(reader.decode({"ogg": tar.extractfile(name).read()})))
    return found


@pytest.mark.parametrize(("rate", "bands"), [(16_000, 64), (8000, 40)])
def test_a_spoken_word_has_nearly_the_same_spectrogram_again(words, rate, bands):
    for wave in words:
        mel = log_mel(wave, rate, bands)
        again = log_mel(griffin_lim(mel, rate), rate, bands)
        n = min(len(mel), len(again))
        gap = (mel[:n] - again[:n]).abs()
        loud = mel[:n] > mel.max() - 8
        assert gap[loud].mean() < 0.15  # nats of power, of a deviation of 4
        assert gap.mean() < 0.3
        random_phases = log_mel(griffin_lim(mel, rate, steps=0), rate, bands)[:n]
        assert gap[loud].mean() < 0.4 * (mel[:n] - random_phases).abs()[loud].mean()


def test_it_is_the_inverse_of_a_reader(words):
    reader = AudioReader(seconds=2.0)
    t = reader.prepare(reader.tokens(words[0]).map(lambda field: field[None]))
    sound = griffin_lim(torch.from_numpy(reader.restore(t)), reader.rate)
    assert abs(len(sound) - len(words[0])) < 0.1 * reader.rate  # up to a whole token of frames
    assert torch.isfinite(sound).all()
    assert torch.equal(sound, griffin_lim(torch.from_numpy(reader.restore(t)), reader.rate))


def test_powers_are_found_from_bands_and_never_negative():
    _, _, size = frame(16_000)
    bank = mel_bank(16_000, size, 64)
    torch.manual_seed(0)
    mel = torch.rand(5, size // 2 + 1) @ bank
    power = linear(mel, bank)
    assert (power >= 0).all()
    assert ((power @ bank - mel).abs() / mel.mean()).mean() < 0.02
