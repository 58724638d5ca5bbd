import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headwater.datamodules.collate import collate
from headwater.datamodules.sources import drawn
from headwater.modalities import Boxes, Categories, Category, Numbers, PatchClasses, Transcript
from headwater.modalities.image import ImageReader
from headwater.view import View


def read(reader, value=None, view=None, member="json", **fields):
    content = {member: (json.dumps(fields) if value is None else value).encode()}
    return reader.tokens(reader.decode(content), view)


def test_a_category_is_its_number_and_a_list_one_per_entry():
    reader = Category(["cat", "dog"], "kind")
    assert read(reader, kind="dog").x.tolist() == [1]
    several = read(reader, kind=["dog", None, "cat"])
    assert several.x.tolist() == [1, 0]
    assert several.position.tolist() == [[0], [2]]
    assert reader.restore(several.map(lambda f: f[None])) == ["dog", "cat"]
    assert read(Category(3, None, "cls"), "2", member="cls").x.tolist() == [2]


def test_what_is_missing_is_no_token_and_batches_with_what_is_there():
    for reader in (Category(["a"], "kind"), Categories(["a"], "kind"), Numbers(["kind"]), Transcript(field="kind", member="json")):
        found = [read(reader, other=1), read(reader, kind=None)]
        assert all(len(t.x) == len(t.position) == 0 for t in found)
        batch = collate([{"it": t} for t in [*found, *reader.example(1, 0)]], ["it"])["it"]
        assert batch.samples().tolist() == [2]
        assert collate([{"it": t} for t in found], ["it"])["it"].samples().tolist() == []


def test_classes_come_from_a_file_too(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("zebra\nape\n")
    reader = Category(str(names), "kind")
    assert read(reader, kind="ape").x.tolist() == [1]
    assert reader.files() == {"classes": names}
    assert pickle.loads(pickle.dumps(reader)).vocab == 2


@pytest.mark.parametrize(
    ("reader", "fields", "said"),
    [
        (Category(["cat", "dog"], "kind"), {"kind": "cow"}, "found the class 'cow'; expected one of cat, dog"),
        (Categories(["a"], "tags"), {"tags": "a"}, "expected a list of names"),
        (Numbers(["size"]), {"size": "large"}, "found 'large' in one of size"),
        (Boxes(), {"boxes": [[0, 0, 1, 1]]}, "without the `width` and `height`"),
    ],
)
def test_a_wrong_value_is_named(reader, fields, said):
    with pytest.raises(ValueError, match=said):
        read(reader, **fields)
    assert len(read(Category(["cat"], "kind", others=True), kind="cow").x) == 0


def test_several_classes_are_flags_or_counts():
    reader = Categories(["sad", "happy", "wild"])
    assert read(reader, tags=["wild", "sad", "unheard"]).x.tolist() == [[1, 0, 1]]
    assert read(reader, tags=[]).x.tolist() == [[0, 0, 0]]
    assert read(reader, tags={"happy": 3, "sad": 1}).x.tolist() == [[1, 3, 0]]


def test_numbers_are_scaled_and_may_be_partly_missing():
    reader = Numbers(["mass", "charge"], [10.0, 0.0], [2.0, 1.0])
    t = read(reader, mass=14)
    assert t.x[0, 0] == 14
    assert t.x[0, 1].isnan()
    ready = reader.prepare(t.map(lambda f: f[None]))
    assert ready.x[0, 0, 0] == 2.0
    assert reader.restore(ready)[0][0] == 14
    steps = read(reader, mass=[1, 2, 3], charge=[1, None])
    assert_close(steps.x, torch.tensor([[1.0, 1.0], [2.0, math.nan], [3.0, math.nan]]), equal_nan=True)
    assert steps.position.tolist() == [[0], [1], [2]]


def test_a_transcript_keeps_the_letters_that_it_knows():
    reader = Transcript("abc ")
    t = read(reader, "A cab, Bob", member="txt")
    assert reader.restore(t.map(lambda f: f[None])) == "a cab bb"
    assert len(read(Transcript("a", length=2), "aaaa", member="txt").x) == 2


def test_labels_that_follow_a_picture_get_its_view():
    seeds = torch.tensor([3, 4])
    readers = {"image": ImageReader(), "boxes": Boxes(), "kind": Category(2)}
    first, second = drawn({"image": View()}, readers, seeds)
    assert first["boxes"] is first["image"]
    assert second["boxes"].seed != first["boxes"].seed
    assert "kind" not in first


@pytest.mark.parametrize("shape", ["pad", "squash"])
@pytest.mark.parametrize("view", [None, *(View((0.4, 0.9), 1.0, strength, seed) for seed in range(4) for strength in (0.0, 0.01))])
def test_boxes_and_maps_lie_where_the_picture_shows_them(view, shape):
    """A red rectangle is drawn, seen through the picture's reader, and found again where the labels say."""
    height, width, size, patch = 60, 90, 64, 4
    picture, level = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    left, top, right, bottom = 27, 18, 63, 42
    picture[top:bottom, left:right, 0], level[top:bottom, left:right] = 255, 1
    image = ImageReader(size, patch, "native" if shape == "squash" else "pad")
    if shape == "squash":
        image = ImageReader(size, patch, "squash", interpolation="bilinear")
    t = image.tokens(picture, view)
    seen = image.restore(image.prepare(t.map(lambda f: f[None])))
    red = (seen[..., 0] > 128) & (seen[..., 1] < 128)
    boxes = read(
        Boxes(shape=shape),
        view=view,
        boxes=[[left / width, top / height, right / width, bottom / height]],
        width=width,
        height=height,
    )
    assert len(boxes.x) == 1
    rows, columns = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / size
    assert_close(boxes.x[0], found, atol=2.5 / size, rtol=0)
    classes = PatchClasses(2, size, patch, shape).tokens(level, view)
    truth = torch.from_numpy(red.reshape(size // patch, patch, size // patch, patch).mean((1, 3)))
    clear = [(int(k), float(truth[r, c])) for k, (_, r, c) in zip(classes.x, classes.position.tolist(), strict=True)]
    assert np.mean([k == round(share) for k, share in clear if abs(share - 0.5) > 0.2]) > 0.97
    assert sum(k for k, _ in clear) > 5


def test_a_box_outside_of_the_view_is_no_token():
    view = next(v for v in (View((0.1, 0.1), seed=s) for s in range(50)) if v.uniform((3,), "crop")[2] > 0.9)
    assert len(read(Boxes(), view=view, boxes=[[0.0, 0.0, 0.1, 0.1]], width=100, height=100).x) == 0
    assert len(read(Boxes(), boxes=[], width=1, height=1).x) == 0
