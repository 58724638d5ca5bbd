"""Random views: what readers make of them, how the loader deals them out, and that they are a function of the seed."""

import json

import numpy as np
import pytest
import torch
from contracts import cases

from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.audio import AudioReader
from headwater.modalities.image import ImageReader
from headwater.modalities.scaling import crop, mirrored, recolour, window
from headwater.modalities.text import TextReader
from headwater.modalities.video import VideoReader
from headwater.model import Reader
from headwater.tokens import Tokens
from headwater.view import View

LOCAL = View(share=(0.1, 0.3), scale=0.5)


@pytest.mark.parametrize("wrong", [{"share": (0.0, 1.0)}, {"share": (0.9, 0.4)}, {"scale": 0.0}, {"strength": 2.0}])
def test_impossible_views_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        View(**wrong)


def test_what_is_cropped_has_the_share_and_the_shape_that_were_asked_for():
    board = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3)
    for seed in range(50):
        view = View(share=(0.2, 0.5), seed=seed)
        top, left, height, width = window(100, 200, view)
        assert 0.18 < height * width / 20000 < 0.52
        assert abs(width / height - 2) < 0.1
        assert np.array_equal(crop(board, view), board[top : top + height, left : left + width])


def test_colours_change_with_strength_and_not_without():
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    assert recolour(picture, View(seed=3)) is picture
    changed = [recolour(picture, View(strength=1.0, seed=seed)) for seed in range(60)]
    assert all(c.dtype == np.uint8 and not np.array_equal(c, picture) for c in changed)
    grey = sum(bool(np.ptp(c.astype(int), axis=-1).max() <= 1) for c in changed)
    assert 4 < grey < 24  # one in five
    assert 15 < sum(mirrored(View(strength=1.0, seed=seed)) for seed in range(60)) < 45
    film = np.stack([picture, picture])
    assert np.array_equal(*recolour(film, View(strength=0.5, seed=1)))


def test_a_smaller_view_has_fewer_patches():
    picture = np.random.default_rng(0).integers(0, 255, (40, 64, 3)).astype(np.uint8)
    reader = ImageReader(64, 8)
    assert len(reader.tokens(picture, View(seed=1)).x) == 64
    for shape in ("pad", "crop", "squash", "border"):
        small = ImageReader(64, 8, shape).tokens(picture, LOCAL)
        assert small.x.shape == (16, 192)
        assert small.position.max() == 3
    film = np.stack([picture] * 3)
    assert len(VideoReader(64, 16, frames=3, tubelet=1).tokens(film, LOCAL).x) == 3 * 4


def test_sounds_and_texts_have_parts_too():
    wave = torch.sin(torch.arange(16000) / 7)
    audio = AudioReader(seconds=1.0)
    whole, part = (len(audio.tokens(wave, view).x) for view in (View(seed=1), View(share=(0.3, 0.4), seed=1)))
    assert 0.25 * whole < part < 0.45 * whole
    noisy, plain = (audio.tokens(wave, View(strength=s, seed=1)).x for s in (1.0, 0.0))
    assert noisy.shape == plain.shape
    assert not torch.equal(noisy, plain)
    text = TextReader(length=200)
    words = "one two three four five six seven eight nine ten"

    def seen(view):
        return text.restore(text.prepare(text.tokens(words, view)).map(lambda field: field[None])).split()

    assert seen(View(seed=1)) == words.split()
    runs = {" ".join(seen(View(share=(0.2, 0.5), seed=seed))) for seed in range(40)}
    assert len(runs) > 10
    assert all(run in words and 2 <= len(run.split()) <= 5 for run in runs)
    lost = [len(seen(View(strength=0.3, seed=seed))) for seed in range(200)]
    assert 6.5 < np.mean(lost) < 7.5
    assert seen(View(strength=1.0)) != []


class Box(Reader):
    """A box in pixels, carried through the views of the picture that it lies on."""

    extensions = ("json",)
    features = 4
    follows = "image@a"

    def decode(self, members):
        return json.loads(members["json"])

    def tokens(self, signal, view=None):
        top, left, height, width = (0, 0, *signal["size"]) if view is None else window(*signal["size"], view)
        x = torch.tensor([[top, left, height, width]], dtype=torch.float32)
        return Tokens(x, torch.zeros(1, 1, dtype=torch.int32))

    def example(self, n, seed):
        return [self.tokens({"size": [8, 8]})] * n


@pytest.fixture
def source(tmp_path):
    from io import BytesIO

    from PIL import Image as Pictures

    with ShardWriter(str(tmp_path / "train-{:05d}.tar"), samples=64) as writer:
        for k in range(8):
            rows, columns = np.mgrid[:64, :64].astype(np.uint8)
            file = BytesIO()
            Pictures.fromarray(np.stack([rows, columns, rows * 0], -1)).save(file, "png")
            writer.write(f"{k:04d}", {"png": file.getvalue(), "json": json.dumps({"size": [64, 64]}).encode()})
    reader = ImageReader(64, 8)
    readers = {"image": reader, "image@a": reader, "image@b": reader, "box": Box()}
    views = {"image@a": View(share=(0.2, 0.5)), "image@b": LOCAL}
    return OpenSource("s", Source(str(tmp_path)), readers, 0, 4, 0, views)


def test_the_loader_makes_the_views_that_are_asked_for_and_labels_follow(source):
    (sample, *_), again = source.read(np.arange(8)), source.read(np.arange(8))[0]
    assert {name: len(t.x) for name, t in sample.sample.items()} == {"image": 64, "image@a": 64, "image@b": 16, "box": 1}
    assert all(torch.equal(t.x, again.sample[name].x) for name, t in sample.sample.items())
    for read in source.read(np.arange(8)):
        top, left, height, width = read.sample["box"].x[0].tolist()
        shown = read.sample["image@a"].x.view(64, 8, 8, 3)  # the colours tell the row and the column
        assert abs(int(shown[..., 0].min()) - top) <= 1
        assert abs(int(shown[..., 0].max()) - (top + height - 1)) <= 1
        assert abs(int(shown[..., 1].min()) - left) <= 1
        assert abs(int(shown[..., 1].max()) - (left + width - 1)) <= 1
    a, b = (source.read(np.arange(2))[k].sample["image@a"].x for k in (0, 1))
    assert not torch.equal(a, b)


def test_views_of_one_shape_are_encoded_in_one_pass_and_as_if_alone(monkeypatch):
    model = cases.model()
    readers = {f"image@{k}": model.readers["image"] for k in range(3)} | {"text": model.readers["text"]}
    batch = cases.batch(readers, [{n: r.example(5, k)[i] for k, (n, r) in enumerate(readers.items())} for i in range(5)])
    batch = {name: batch[name] for name in readers}
    alone = {name: model.encode(model.embed({name: t}))[name] for name, t in batch.items()}
    passes = []
    plain = type(model.encoders["image"]).forward
    monkeypatch.setattr(type(model.encoders["image"]), "forward", lambda self, t, *a: passes.append(len(t.x)) or plain(self, t, *a))
    for name, t in model.encode(model.embed(batch)).items():
        torch.testing.assert_close(t.x, alone[name].x)
        assert t.position.shape == alone[name].position.shape
    assert 15 in passes
    assert len(passes) <= 2
