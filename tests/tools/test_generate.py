"""`headwater generate`: files in, texts on the screen and files of every kind out."""

import tarfile

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image as Pictures

import headwater
from headwater import cli
from headwater.embedded import place
from headwater.fusion import JointTokens
from headwater.generation.files import load, save, sheet, suffix
from headwater.modalities import Action, Audio, Image, Text, Video, Wave
from headwater.modalities.audio import log_mel
from headwater.modalities.films import PyavFilm
from headwater.modalities.text import TextReader
from headwater.modalities.wave import WaveReader
from headwater.model import Model
from headwater.tools.generate import Printer
from headwater.trunk import Trunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    small = [Trunk(16, 1, 2) for _ in range(5)]
    encoders = {
        "text": Text(small[0], length=16),
        "image": Image(small[1], 16, 8),
        "audio": Audio(small[2], bands=16, frames=4, seconds=0.2),
        "video": Video(small[3], 16, 8, frames=4),
        "action": Action(small[4], slots=2, steps=4),
    }
    model = Model(encoders, lambda widths: JointTokens(widths, Trunk(16, 1, 2)))
    return headwater.save_backbone(model, tmp_path_factory.mktemp("generate") / "backbone")


@pytest.fixture
def files(tmp_path):
    """One file of every kind."""
    rng = np.random.default_rng(0)
    Pictures.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "a dog.v2.jpg")
    soundfile.write(tmp_path / "bark.wav", rng.normal(size=3200) * 0.1, 16_000)
    np.save(tmp_path / "steps.npy", rng.normal(size=(3, 2)).astype(np.float32))
    with tarfile.open(place("embedded:episodes-train-000.tar")) as tar:
        name = next(n for n in tar.getnames() if n.endswith(".mp4"))
        (tmp_path / "film.mp4").write_bytes(tar.extractfile(name).read())
    return tmp_path


def run(*given):
    cli.main(["generate", *map(str, given)])


def test_texts_are_printed_while_they_grow(folder, files, capsys):
    given = ("--text", "a d", "--image", files / "a dog.v2.jpg", "--audio", files / "bark.wav", "--temperature", "0")
    choices = '["ozen", "og"]'
    run(folder, *given, "--choices", choices, "--video", files / "film.mp4", "--action", files / "steps.npy")
    said = capsys.readouterr().out
    assert said in ("a dozen\n", "a dog\n")
    run(folder, *given, "--choices", choices, "--samples", 3)
    assert set(capsys.readouterr().out.splitlines()) <= {"a dozen", "a dog"}
    run(folder, "--text", "a d", "--choices", choices, "--out", files / "said.txt")
    assert (files / "said.txt").read_text() in ("a dozen\n", "a dog\n")


def test_every_kind_of_signal_becomes_its_file(folder, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    given = ("--text", "a dog")
    run(folder, "--to", "image", *given, "--out", "x.png")
    assert np.asarray(Pictures.open("x.png")).shape == (16, 16, 3)
    run(folder, "--to", "image", "--samples", 2)
    assert sorted(capsys.readouterr().out.split()) == ["generated-image-0.png", "generated-image-1.png", "x.png"]
    run(folder, "--to", "audio", *given, "--out", "x")
    sound, rate = soundfile.read("x.wav")
    assert rate == 16_000
    assert abs(len(sound) / rate - 0.2) < 0.05
    run(folder, "--to", "video", *given)
    assert PyavFilm((files / "generated-video.mp4").read_bytes()).frames == 4
    run(folder, "--to", "action", *given, "--video", "film.mp4", "--out", "x.npy")
    frames = PyavFilm((files / "film.mp4").read_bytes()).frames  # as many steps as there are frames, up to the reader's four
    assert np.load("x.npy").shape == (min(4, frames), 2)


def test_what_is_wrong_is_told(folder, files):
    for given, said in (
        (("--to", "smell"), "modalities of this backbone are text, image"),
        (("--image", files / "none.png"), "found no file"),
        (("--image", files / "bark.wav"), "cannot be read"),
        (("--to", "image", "--out", files / "x.wav"), r"is a \.png file"),
        (("--temperature", "-1"), "temperature"),
    ):
        with pytest.raises(SystemExit, match=said):
            run(folder, *given)


def test_a_sound_is_heard_again_from_its_file(tmp_path):
    """Through log-mel patches and through windows of samples."""
    with tarfile.open(place("embedded:speech-train-000.tar")) as tar:
        name = next(n for n in tar.getnames() if n.endswith(".ogg"))
        (tmp_path / "word.ogg").write_bytes(tar.extractfile(name).read())
    for encoder in (Audio(Trunk(16, 1)), Wave(Trunk(16, 1), channels=8)):
        reader = encoder.reader
        word = load(str(tmp_path / "word.ogg"), reader)
        t = reader.prepare(reader.tokens(word).map(lambda field: field[None]))
        path = save(reader.restore(t), reader, tmp_path / "again")
        samples, rate = soundfile.read(path, dtype="float32")
        before, after = (log_mel(torch.as_tensor(w), rate, 32) for w in (reader.wave(word), samples))
        n = min(len(before), len(after))
        before, after = (m[:n] - m[:n].mean() for m in (before, after))
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.97


def test_a_letter_waits_for_all_of_its_bytes(capsys):
    printer, reader = Printer(), TextReader()
    ids = reader.tokens("für 3 €").x[None]
    for n in range(1, ids.shape[1] + 1):
        printer.show(reader.restore(reader.canvas(torch.zeros(n, 1, dtype=torch.int32))._replace(x=ids[:, :n])))
    assert capsys.readouterr().out == "für 3 €"
    printer.finish(["für 3 €"])
    assert capsys.readouterr().out == "\n"


def test_pictures_lie_on_one_sheet():
    pictures = [np.full((4, 6, 3), n, np.uint8) for n in range(5)]
    made = sheet(pictures, columns=3, gap=1)
    assert made.shape == (9, 20, 3)
    assert (made[5:, 7:13] == 4).all()
    assert (made[4] == 255).all()
    assert (made[5:, 14:] == 255).all()


def test_kinds_of_files():
    reader = WaveReader()
    assert suffix("a", reader) == ".txt"
    assert suffix(np.zeros(3, np.float32), reader) == ".wav"
    assert suffix(np.zeros((3, 2)), TextReader()) == ".npy"
    with pytest.raises(ValueError, match="no kind of file"):
        suffix({"a": 1}, TextReader())
