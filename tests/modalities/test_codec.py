import io
import tarfile

import numpy as np
import pytest
import torch
from learning import descend

from headwater.datamodules.collate import collate
from headwater.embedded import place
from headwater.modalities import Codec
from headwater.modalities.audio import AudioReader
from headwater.modalities.codec import CodecReader
from headwater.model import Model
from headwater.objectives import Causal
from headwater.tools.lengths import measure
from headwater.trunk import Trunk
from headwater.view import View

RATE = 4000


@pytest.fixture(scope="module")
def waves():
    """Embedded sounds of several lengths, up to 0.4 s."""
    reader = AudioReader(RATE, seconds=0.4)
    with tarfile.open(place("embedded:sounds-train-000.tar")) as tar:
        contents = [tar.extractfile(m).read() for m in tar if m.name.endswith("ogg")][::16]
    return [reader.wave(reader.decode({"ogg": content})) for content in contents[:8]]


@pytest.fixture(scope="module")
def codec(waves):
    """A small EnCodec of transformers with random weights; its codebooks are 32 latents of the sounds, then of residuals."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        sampling_rate=RATE, target_bandwidths=[2.5], upsampling_ratios=[8, 4], codebook_size=32, num_filters=4, hidden_size=16,
        codebook_dim=16, num_lstm_layers=1,
    )  # fmt: skip
    model = transformers.EncodecModel(config).eval()
    with torch.no_grad():
        rest = torch.cat([model.encoder(wave[None, None])[0].T for wave in waves])
        for layer in model.quantizer.layers:
            layer.codebook.embed.copy_(rest[torch.randperm(len(rest))[:32]])
            rest = rest - layer.codebook.decode(layer.codebook.encode(rest))
    return model


@pytest.fixture(scope="module")
def coded(codec, waves):
    """Codes (T, K) of the sounds, as .npy files."""
    files = []
    for wave in waves:
        with torch.no_grad():
            codes = codec.encode(wave[None, None]).audio_codes[0, 0].T.numpy()
        file = io.BytesIO()
        np.save(file, codes.astype(np.int16))
        files.append(file.getvalue())
    return files


def codes(steps=5, books=4, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, size, (steps, books))


@pytest.mark.parametrize("pattern", ["flatten", "delay"])
def test_codes_of_real_sounds_come_back_and_sound_the_same(codec, coded, pattern):
    reader = CodecReader(4, 32, pattern=pattern)
    samples = [{"audio": reader.tokens(reader.decode({"codes.npy": content}))} for content in coded]
    assert len({len(s["audio"].x) for s in samples}) > 1
    assert min(torch.cat([s["audio"].x for s in samples]).bincount(minlength=128).unflatten(0, (4, 32)).count_nonzero(1)) > 16
    ready = reader.prepare(collate(samples, ["audio"])["audio"])
    for i, content in enumerate(coded):
        original, back = np.load(io.BytesIO(content)), reader.restore(ready.map(lambda field, i=i: field[i : i + 1]))
        assert np.array_equal(back, original)
        with torch.no_grad():
            heard, again = (codec.decode(torch.from_numpy(c.astype(np.int64)).T[None, None], [None]) for c in (original, back))
        assert torch.equal(heard.audio_values, again.audio_values)


def test_the_delay_is_that_of_musicgen():
    """Column s + 1 of MusicGen's pattern (its first one is the start) holds the tokens of step s."""
    transformers = pytest.importorskip("transformers")
    musicgen = transformers.models.musicgen.modeling_musicgen.MusicgenForCausalLM
    config = transformers.MusicgenDecoderConfig(
        vocab_size=32, num_hidden_layers=1, hidden_size=8, num_attention_heads=1, ffn_dim=8, pad_token_id=0, bos_token_id=0
    )
    array, pad = codes(6), 99
    started = np.concatenate([np.full((4, 1), pad), array.T], 1)
    _, pattern = musicgen(config).build_delay_pattern_mask(torch.from_numpy(started), pad, 1 + 6 + 3)
    t = CodecReader(4, 32).tokens(array)
    for step in range(9):
        expected = {(book, int(code)) for book, code in enumerate(pattern[:, step + 1]) if code != pad}
        here = t.position[:, 0] == step
        assert {(i // 32, i % 32) for i in t.x[here].tolist()} == expected
        assert t.position[here, 1].tolist() == sorted(book for book, _ in expected)
    assert torch.equal(t.order, t.position[:, 0].long())


def test_flattened_codes_follow_one_another():
    t = CodecReader(3, 32, pattern="flatten").tokens(codes())
    assert t.x.tolist() == [int(code) + 32 * book for moment in codes() for book, code in enumerate(moment[:3])]
    assert t.position.tolist() == [[moment, book] for moment in range(5) for book in range(3)]
    assert t.order is None


def test_fewer_codebooks_are_the_coarser_ones():
    reader = CodecReader(2, 32)
    assert np.array_equal(reader.restore(collate([{"a": reader.tokens(codes())}], ["a"])["a"]), codes()[:, :2])


def test_a_view_of_long_codes_is_a_random_part():
    reader, long = CodecReader(1, 100, steps=10), np.arange(40)[:, None]
    starts = {int(reader.tokens(long, View(seed=seed)).x[0]) for seed in range(200)}
    assert starts == set(range(31))
    assert reader.tokens(long).x.tolist() == list(range(10))


def test_the_length_is_known_from_the_header(coded):
    reader = CodecReader(3, 32, steps=40)
    for content in coded:
        facts = {name.rpartition(".")[2]: value for name, value in measure("codes.npy", content).items()}
        assert reader.length(facts) == len(reader.tokens(reader.decode({"codes.npy": content})).x)
    assert reader.length({"size": 1}) is None


def test_what_is_no_code_is_refused():
    reader = CodecReader(4, 32)
    for wrong in (codes().astype(np.float32), codes()[0], codes()[:0], codes(books=3)):
        with pytest.raises(ValueError, match="one row per moment"):
            reader.tokens(wrong)
    for wrong in (codes() + 32, codes() - 32):
        with pytest.raises(ValueError, match="expected 0 to 31"):
            reader.tokens(wrong)
    with pytest.raises(ValueError, match="pattern"):
        CodecReader(pattern="parallel")
    t = collate([{"a": reader.tokens(codes())}], ["a"])["a"]
    with pytest.raises(ValueError, match="no code of it"):
        reader.restore(t._replace(x=t.x.flip(1)))
    with pytest.raises(ValueError, match="multiple"):
        reader.restore(t.map(lambda field: field[:, :-1]))


@pytest.mark.parametrize("pattern", ["flatten", "delay"])
def test_causal_prediction_learns_codes_of_real_sounds(coded, pattern):
    torch.manual_seed(0)
    encoder = Codec(Trunk(32, 2), 4, 32, steps=24, pattern=pattern)
    reader, model = encoder.reader, Model({"audio": encoder})
    samples = [{"audio": reader.tokens(reader.decode({"codes.npy": content}))} for content in coded]
    losses = descend(model, Causal(model, modality="audio"), {"audio": collate(samples, ["audio"])["audio"]}, steps=40, rate=1e-2)
    assert losses[-1] < 0.6 * losses[0]
