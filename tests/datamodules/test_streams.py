"""Members renamed, interleaved documents, and related samples as one."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Arrange, Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.streams import Interleaved, Stream, join, segments
from headwater.datamodules.writer import ShardWriter
from headwater.fusion import JointTokens
from headwater.modalities.image import Image, ImageReader
from headwater.modalities.text import Text, TextReader
from headwater.model import Model
from headwater.objectives import Causal
from headwater.tokens import attention_mask, cat
from headwater.trunk import Trunk

READERS = {"text": TextReader(length=40), "image": ImageReader(32, 16)}
SEGMENTS = [{"text": "ab"}, {"image": "0.png"}, {"text": "cde"}, {"image": "1.png"}, {"text": "f"}]


def picture(colour):
    file = io.BytesIO()
    Pictures.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def documents(tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for k in range(6):
            pictures = {"0.png": picture((k, 0, 0)), "1.png": picture((0, k, 0))}
            parallel = {"texts": ["ab", None, "cde", None, "f"], "images": [None, "0.png", None, "1.png", None]}
            document = {"segments": SEGMENTS} if k % 2 else parallel
            writer.write(str(k), {"json": json.dumps(document).encode(), **pictures})
    return str(tmp_path)


def opened(path, stream, window=0):
    return OpenSource("s", Source(path, stream=stream), READERS, 0, window)


def test_texts_and_pictures_share_one_order(documents):
    for read in opened(documents, Interleaved()).read(np.arange(6)):
        assert read.faults == []
        text, image = read.sample["text"], read.sample["image"]
        # ab and its end: 0 1 2; picture: 3; cde and its end: 4 5 6 7; picture: 8; f and its end: 9 10
        assert text.order.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10] == text.position[:, 0].tolist()
        assert image.order.tolist() == [3] * 4 + [8] * 4 == image.position[:, 0].tolist()
        assert image.position[:4, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert bytes(text.x[text.x < 256].tolist()) == b"abcdef"


def test_a_text_sees_the_pictures_before_it_and_no_later_one(documents):
    sample = opened(documents, Interleaved()).read(np.arange(1))[0].sample
    parts = [sample[name].map(lambda field: field[None]) for name in ("text", "image")]
    whole = cat([p._replace(x=p.position[..., :1]) for p in parts])
    seen = attention_mask(whole, whole, causal=True).dense[0, 0]
    first_picture, second_picture = slice(9, 13), slice(13, 17)
    assert not seen[2, first_picture].any()
    assert seen[3, first_picture].all()
    assert not seen[3, second_picture].any()
    assert seen[9, 10]  # patches of a picture see each other
    assert seen[9, :3].all()
    assert not seen[9, 3:9].any()


def test_a_document_is_cut_after_its_length(documents):
    sample = opened(documents, Interleaved(length=6)).read(np.arange(1))[0].sample
    assert sample["text"].order.tolist() == [0, 1, 2, 4, 5]
    assert sample["image"].order.tolist() == [3] * 4


def test_a_damaged_picture_costs_itself_only(tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        content = json.dumps({"segments": [*SEGMENTS, {"image": "9.png"}]}).encode()
        writer.write("a", {"json": content, "0.png": b"no", "1.png": picture("red")})
        writer.write("b", {"json": b'{"other": 1}', "1.png": picture("red")})
    read = opened(str(tmp_path), Interleaved()).read(np.arange(2))
    assert read[0].sample["image"].order.tolist() == [7] * 4
    assert len(read[0].sample["text"].x) == 9
    assert len(read[0].faults) == 1
    assert "holds neither" in read[1].faults[0]


def test_segments_of_both_forms():
    parallel = {"texts": ["a", None, " "], "images": [None, "x.png", None]}
    assert segments(parallel) == [("text", "a"), ("image", "x.png")]
    with pytest.raises(ValueError, match="neither"):
        segments([])
    with pytest.raises(ValueError, match="shorter"):
        segments({"texts": ["a"], "images": []})


def test_documents_are_packed_by_upper_bounds(documents):
    source = opened(documents, Interleaved())
    lengths = source.lengths(np.arange(6))
    assert lengths["image"].tolist() == [8] * 6
    assert (lengths["text"] >= 9).all()
    batch = ShardDataset(Plan([source], Ledger([1.0]), 6, pack={"text": 400, "image": 32})).batch(0)
    assert batch["text"].document is not None
    assert batch["image"].samples().tolist() == list(range(6))


def test_one_of_two_cameras_is_chosen(tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        writer.write("a", {"left.png": picture("red"), "right.png": picture("blue")})
    found = {}
    for side in ("left", "right"):
        stream = Stream({"png": f"{side}.png"})
        source = opened(str(tmp_path), stream)
        assert source.wanted == {f"{side}.png"}
        found[side] = source.read(np.arange(1))[0].sample["image"].x[0, :3].tolist()
        assert source.lengths(np.arange(1))["image"].tolist() == [4]
    assert found == {"left": [255, 0, 0], "right": [0, 0, 255]}
    with pytest.raises(ValueError, match="which no encoder reads"):
        opened(str(tmp_path), None)


def test_related_samples_become_one_document(tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for k in range(12):
            writer.write(f"{k:02d}", {"txt": f"text {k}".encode()}, {"txt.cluster": k % 3})
    source = OpenSource("s", Source(str(tmp_path)), READERS, 0, 1)
    arrange = Arrange("txt.cluster", 1, join=True)
    batch = ShardDataset(Plan([source], Ledger([1.0]), 12, arrange=arrange, pack={"text": 64})).batch(0)
    text = batch["text"]
    assert len(batch["sample"]) == len(batch["seed"]) == 12
    assert len(text.samples()) == 3
    for number in text.samples().tolist():
        mine = text.document == number
        ids = text.x[mine & text.valid].tolist()
        found = bytes(b for b in ids if b < 256).decode().split("text ")[1:]
        assert len(found) == 4
        assert len({int(k) % 3 for k in found}) == 1
        assert text.position[mine & text.valid][:, 0].tolist() == list(range(len(ids)))  # later samples at later times


def test_joined_orders_follow_one_another():
    one = {"text": READERS["text"].tokens("abc")}
    two = {"text": READERS["text"].tokens("de")._replace(order=torch.tensor([0, 0, 1]))}
    assert join([one, one])["text"].order.tolist() == [*range(8)]
    assert join([two, two])["text"].order.tolist() == [0, 0, 1, 3, 3, 4]


def test_a_member_that_could_not_be_measured_counts_nothing(tmp_path):
    reader = {"image": ImageReader(32, 16, shape="native")}
    with ShardWriter(tmp_path / "{}.tar") as writer:
        writer.write("a", {"png": picture("red")}, {"png.width": 32, "png.height": 32})
        writer.write("b", {"png": b"no"})
    source = OpenSource("s", Source(str(tmp_path)), reader, 0, 0)
    assert source.lengths(np.arange(2))["image"].tolist() == [4, 0]
    with ShardWriter(tmp_path / "plain" / "{}.tar") as writer:
        writer.write("a", {"png": picture("red")})
    with pytest.raises(ValueError, match="headwater index --measure"):
        OpenSource("s", Source(str(tmp_path / "plain")), reader, 0, 0).lengths(np.arange(1))


def test_pictures_of_their_own_shape_are_packed(tmp_path):
    reader = {"image": ImageReader(64, 16, shape="native")}
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for k in range(24):
            file = io.BytesIO()
            width, height = 16 * (1 + k % 4), 16 * (1 + k // 4 % 3)
            Pictures.new("RGB", (width, height), (10 * k, 0, 0)).save(file, "PNG")
            writer.write(f"{k:02d}", {"png": file.getvalue()}, {"png.width": width, "png.height": height})
    source = OpenSource("s", Source(str(tmp_path)), reader, 0, 1)
    batch = ShardDataset(Plan([source], Ledger([1.0]), 24, pack={"image": 16})).batch(0)
    image = batch["image"]
    assert image.x.shape[1] == 16
    assert image.valid.float().mean() > 0.9
    shapes = []
    for number in range(24):
        mine = image.valid & (image.document == number)
        rows, columns = (int(image.position[mine][:, axis].max()) + 1 for axis in (1, 2))
        shapes.append((rows, columns))
        assert int(mine.sum()) == rows * columns  # every patch of its grid
    assert sorted(shapes) == sorted((1 + k // 4 % 3, 1 + k % 4) for k in range(24))


def test_a_causal_model_learns_from_pictures_before_a_text_and_never_from_later_ones(documents):
    torch.manual_seed(0)

    def trunk():
        return Trunk(16, 1, 2)

    model = Model({"text": Text(trunk(), length=40), "image": Image(trunk(), 32, 16)}, lambda widths: JointTokens(widths, trunk()))
    source = opened(documents, Interleaved())
    batch = ShardDataset(Plan([source], Ledger([1.0]), 2)).batch(0)
    objective = Causal(model, modality="text", context=["image"])
    ready = {name: model.readers[name].prepare(batch[name]) for name in ("image", "text")} | {"seed": batch["seed"]}
    ready["image"].x.requires_grad_()
    text = batch["text"]
    for last in (2, 7):  # the end of the first text, and of the second
        seen = {**ready, "text": text._replace(valid=text.valid & (text.order <= last))}
        term = next(iter(objective(model, objective.task(seen)).values()))
        (slope,) = torch.autograd.grad(term.total, ready["image"].x)
        reached = slope.abs().sum(-1) > 0
        assert reached[:, :4].any() == (last == 7)
        assert not reached[:, 4:].any()
