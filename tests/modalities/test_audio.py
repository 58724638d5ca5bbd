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
from headwater.modalities import decoding
from headwater.modalities.audio import Audio, AudioReader, log_mel, mel_bank
from headwater.modalities.sound_reader import resample
from headwater.modalities.sounds import BACKENDS, LibsndfileSound, PyavSound, Sound
from headwater.modalities.video import VideoReader
from headwater.model import Model
from headwater.objectives import Masked
from headwater.trunk import Trunk
from headwater.view import View


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
    a, again, other = (reader.tokens(sine(440, 16000), View(seed=s)).x for s in (1, 1, 2))
    assert torch.equal(a, again)
    assert a.shape != other.shape or not torch.equal(a, other)


def sweep(rate, seconds):
    """A tone that rises, so that every moment sounds different."""
    time = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 100 * time) * time)).astype(np.float32)


def wav(wave, rate, kind="wav", subtype=None):
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, wave, rate, subtype, format=kind)
    return {kind: file.getvalue()}


def aac(wave, rate, container="ipod", film=False):
    """AAC in an .m4a, .aac or .mp4 file, the last one with a moving picture too."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as made:
        stream = made.add_stream("aac", rate=rate, layout="mono", options={"b": "128k"})
        if film:
            picture = made.add_stream("mpeg4", rate=5)
            picture.height, picture.width, picture.pix_fmt = 16, 16, "yuv420p"
            for _ in range(10):
                made.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
            made.mux(picture.encode(None))
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.rate, frame.pts = rate, start
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_only_the_seconds_that_are_needed_are_read(rate, monkeypatch):
    read = []
    original = LibsndfileSound.read
    monkeypatch.setattr(LibsndfileSound, "read", lambda self, *part: read.append(part) or original(self, *part))
    reader, wave = AudioReader(seconds=1.0), sweep(rate, 10)
    signal = reader.decode(wav(wave, rate, subtype="FLOAT"))
    assert isinstance(signal, Sound)
    assert read == []
    plain = reader.tokens(signal)
    assert read[0][0] == 0
    assert rate <= read[0][1] < 1.01 * rate
    cut = torch.from_numpy(wave[: 2 * rate])
    whole = log_mel(resample(cut, rate, 16000)[:16000], 16000, 64)
    assert_close(plain.x.reshape(-1, 64)[: len(whole)].float(), whole, rtol=0, atol=0.01)  # tokens travel as float16


@pytest.mark.parametrize("memory", [False, True])
def test_a_view_of_a_long_sound_is_a_random_part_of_it(memory):
    rate, wave = 16000, sweep(16000, 10)
    reader = AudioReader(seconds=1.0)
    signal = (wave, rate) if memory else reader.decode(wav(wave, rate))
    starts = []
    for seed in range(30):
        t = reader.tokens(signal, View(seed=seed))
        assert torch.equal(t.x, reader.tokens(signal, View(seed=seed)).x)
        assert len(t.x) == len(reader.tokens(signal).x)
        middle = t.x.reshape(-1, 64).float()[20:80].argmax(1).float().mean()  # the band at half a second
        starts.append(float(middle))
    first = float(reader.tokens(signal).x.reshape(-1, 64).float()[20:80].argmax(1).float().mean())
    assert min(starts) >= first - 0.5
    assert max(starts) > 3 * first  # 200 Hz to 2200 Hz
    assert len({round(s, 1) for s in starts}) > 20


def test_a_view_of_a_short_sound_begins_with_silence_and_has_as_many_tokens():
    reader, lengths = AudioReader(bands=8, frames=4), set()
    for seed in range(20):
        t = reader.tokens(sine(440, 16000), View(seed=seed))
        lengths.add(len(t.x))
        quiet = (t.x.reshape(-1, 8).float().amax(1) < -11).sum()
        assert quiet <= 11
    assert lengths == {len(reader.tokens(sine(440, 16000)).x)}


@pytest.mark.parametrize(("container", "extension"), [("ipod", "m4a"), ("adts", "aac")])
def test_what_libsndfile_does_not_know_is_read_by_another(container, extension):
    wave = sweep(16000, 2)
    got, rate = AudioReader().decode({extension: aac(wave, 16000, container)})
    assert rate == 16000
    delay = 1024 if container == "adts" else 0  # this container does not know of the encoder's delay
    assert abs(len(got) - delay - len(wave)) <= 1024
    assert_close(got[delay + 500 : delay + 30000], torch.from_numpy(wave[500:30000]), rtol=0, atol=0.05)


def test_the_sound_of_a_film_is_read_on_demand():
    film = {"mp4": aac(sweep(16000, 2), 16000, "mp4", film=True)}
    assert AudioReader().member(film) is None
    reader = AudioReader(soundtrack=True)
    assert len(reader.decode(film)[0]) == 32000
    assert reader.member({**film, "flac": b""}) == "flac"
    clip = VideoReader(16).decode(film)
    assert (clip.frames, clip.fps, clip.seconds) == (10, 5, 2)  # packets of sound are no frames
    assert AudioReader.extensions == AudioReader().extensions
    with tarfile.open(place("embedded:episodes-test-000.tar")) as tar:
        silent = next(tar.extractfile(m).read() for m in tar if m.name.endswith("mp4"))
    with pytest.raises(ValueError, match="no sound track"):
        reader.decode({"mp4": silent})


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_every_backend_reads_any_part_as_it_is_in_the_whole(backend, kind):
    if fault := decoding.fault("audio", backend):
        pytest.skip(fault)
    wave = np.stack([sweep(8000, 3), 0.5 * sweep(8000, 3)], 1)
    content = wav(wave, 8000, kind)[kind]
    sound = BACKENDS[backend](content)
    assert (sound.rate, sound.count) == (8000, 24000)
    for start, count in ((0, 24000), (12345, 100), (23990, 500), (5, 17), (16000, 4000)):
        got = sound.read(start, count)
        assert got.dtype == np.float32
        assert_close(torch.from_numpy(got), torch.from_numpy(wave.mean(1)[start : start + count]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("container", ["ipod", "mp4", "adts"])
def test_parts_of_aac_equal_those_of_the_whole(container):
    content = aac(sweep(44100, 3), 44100, container)
    sound = PyavSound(content)
    whole = sound.read(0, sound.count)
    for start in (0, 1000, 50_000, 100_003, sound.count - 2000):
        assert_close(sound.read(start, 2000), whole[start : start + 2000], rtol=0, atol=1e-3)


def test_a_long_silence_is_no_fault_where_something_follows():
    reader, wave = AudioReader(seconds=1.0), np.concatenate([np.zeros(32000, np.float32), sweep(16000, 1)])
    assert len(reader.tokens(reader.decode(wav(wave, 16000))).x)
    with pytest.raises(ValueError, match="all zero"):
        reader.tokens(reader.decode(wav(0 * wave, 16000)))


def test_samples_that_are_no_numbers_are_refused():
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, np.array([0.1, np.nan] * 50, np.float32), 8000, format="wav", subtype="FLOAT")
    with pytest.raises(ValueError, match="finite"):
        AudioReader().decode({"wav": file.getvalue()})
    for wrong in (np.zeros((2, 100)), np.zeros(0)):
        with pytest.raises(ValueError, match="samples"):
            AudioReader().tokens((wrong, 8000))
    with pytest.raises(ValueError, match="cannot be opened"):
        AudioReader().decode({"wav": b"RIFF nonsense"})


@pytest.mark.parametrize("options", [{}, {"frames": 1}, {"seconds": 0.7, "rate": 11025}, {"rate": 22050, "frames": 3}])
def test_the_length_is_known_from_the_seconds(options):
    reader, generator = AudioReader(**options), np.random.default_rng(0)
    for rate in (8000, 11025, 16000, 22050, 44100, 48000):
        for count in [*generator.integers(1, 3 * rate, 12).tolist(), rate, 160, 159, 161]:
            wave = np.ones(count, np.float32)
            facts = {"size": 1, "seconds": float(np.float32(count / rate))}
            assert reader.length(facts) == len(reader.tokens((wave, rate)).x), (rate, count)
    assert reader.length({"size": 1}) is None


def test_the_length_of_embedded_sounds_is_exact():
    soundfile = pytest.importorskip("soundfile")
    reader = AudioReader(frames=2, seconds=1.0)
    for shard in ("sounds-test", "things-seen"):
        with tarfile.open(place(f"embedded:{shard}-000.tar")) as tar:
            contents = [tar.extractfile(m).read() for m in tar if m.name.endswith("ogg")]
        for content in contents[:40]:
            info = soundfile.info(io.BytesIO(content))
            t = reader.tokens(reader.decode({"ogg": content}))
            assert reader.length({"size": 1, "seconds": info.frames / info.samplerate}) == len(t.x)
            assert t.position.dtype == torch.int32
            assert t.x.dtype == torch.float16


def sounds(shard, count):
    """The first sounds of an embedded shard, as files."""
    with tarfile.open(place(f"embedded:{shard}-000.tar")) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith("ogg")][:count]


def test_patches_are_cut_out_of_the_spectrogram():
    reader = AudioReader(bands=32, frames=4, height=8)
    for content in sounds("sounds-train", 5):
        signal = reader.decode({"ogg": content})
        t, mel = reader.tokens(signal), log_mel(reader.wave(signal), 16000, 32)
        mel = torch.nn.functional.pad(mel, (0, 0, 0, -len(mel) % 4), value=math.log(1e-5))
        assert len(t.x) == len(mel) // 4 * 4
        assert t.position.tolist() == [[time, band] for time in range(len(mel) // 4) for band in range(4)]
        assert torch.equal(t.order, t.position[:, 0].long())
        for x, (time, band) in zip(t.x, t.position.tolist(), strict=True):
            assert torch.equal(x.reshape(4, 8), mel[4 * time : 4 * time + 4, 8 * band : 8 * band + 8].half())


def test_patches_of_all_bands_are_those_of_before():
    """One token per moment, no order, whatever the height is called."""
    signal = sine(440, 16000)
    plain, whole = AudioReader(bands=32).tokens(signal), AudioReader(bands=32, height=32).tokens(signal)
    assert plain.order is None
    assert torch.equal(plain.x, whole.x)
    assert torch.equal(plain.position, whole.position)
    assert plain.position.tolist() == [[k, 0] for k in range(len(plain.x))]
    with pytest.raises(ValueError, match="divides the bands"):
        AudioReader(bands=32, height=12)


def test_restore_gives_the_spectrogram_of_patches_whatever_the_padding():
    reader, wave = AudioReader(bands=8, frames=4, height=2), sine(440, 16000, 0.3)
    t = reader.prepare(collate([{"a": reader.tokens(wave)}, {"a": reader.tokens(sine(440, 16000, 0.6))}], ["a"])["a"])
    mel = log_mel(wave, 16000, 8)
    assert_close(torch.from_numpy(reader.restore(t))[: len(mel)], mel, rtol=2e-3, atol=5e-3)


def test_the_number_of_patches_is_known_from_the_seconds():
    reader, generator = AudioReader(bands=16, frames=3, height=4, seconds=1.0), np.random.default_rng(0)
    for count in generator.integers(1, 30000, 30).tolist():
        facts = {"size": 1, "seconds": float(np.float32(count / 16000))}
        assert reader.length(facts) == len(reader.tokens((np.ones(count, np.float32), 16000)).x)


def test_a_later_patch_reaches_no_earlier_moment_and_subsets_keep_their_place():
    torch.manual_seed(0)
    encoder = Audio(Trunk(16, 2, 2, position="rotary"), bands=16, frames=4, height=4).double()
    t = encoder.reader.prepare(encoder.reader.tokens(sine(300, 16000, 0.2)).map(lambda field: field[None]))
    t = encoder.embed(t._replace(x=t.x.double()))
    x = t.x.clone().requires_grad_()
    y = encoder(t._replace(x=x), causal=True).x
    (grad,) = torch.autograd.grad((y[0, 6] * torch.randn(16).double()).sum(), x)
    assert ((grad[0].abs().amax(-1) > 0) == (t.order[0] <= t.order[0, 6])).all()
    keep = torch.arange(t.x.shape[1]) % 3 > 0
    marked, taken = encoder(t._replace(valid=keep[None])), encoder(t.take(keep.nonzero().T))
    assert_close(taken.x, marked.x[:, keep])


def test_masked_prediction_learns_patches_of_real_sounds():
    torch.manual_seed(0)
    encoder = Audio(Trunk(32, 2), bands=32, frames=8, height=8, seconds=1.0)
    reader, model = encoder.reader, Model({"audio": encoder})
    samples = [{"audio": reader.tokens(reader.decode({"ogg": content}))} for content in sounds("sounds-train", 16)]
    batch = {"audio": reader.prepare(collate(samples, ["audio"])["audio"])}
    losses = descend(model, Masked(model, modality="audio"), batch)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
