import io
import json

import numpy as np
import pytest
from PIL import Image as Pictures

from headwater.datamodules.pasted import Pasted, paste
from headwater.modalities import Facts
from headwater.modalities.image import ImageReader
from headwater.modalities.record_turns import Template
from headwater.modalities.record_values import Binned, Choice, Row, Several
from headwater.modalities.records import RecordReader
from headwater.view import View

BIN = Binned(bins=16)
ITEM = Row("{left}{top}{right}{bottom}{kind}", {"left": BIN, "top": BIN, "right": BIN, "bottom": BIN, "kind": Choice(["cat"])})
READERS = {"image": ImageReader(32, 8), "text": RecordReader(Template("Detect.", "{boxes}", {"boxes": Several(ITEM)}))}


def sample(height=20, width=30):
    file = io.BytesIO()
    Pictures.new("RGB", (width, height), "navy").save(file, "png")
    return {"png": file.getvalue(), "json": json.dumps({"category": "cat", "source": "web"}).encode()}


def test_the_box_is_where_the_picture_stands():
    picture = np.zeros((20, 30, 3), np.uint8)
    sides, places = set(), set()
    for seed in range(50):
        square, box = paste(picture, View(share=(0.3, 0.7), seed=seed))
        side = len(square)
        rows, columns = np.nonzero((square == 0).all(-1))
        assert [rows.min(), rows.max() + 1] == pytest.approx([box["top"] * side, box["bottom"] * side])
        assert [columns.min(), columns.max() + 1] == pytest.approx([box["left"] * side, box["right"] * side])
        assert 0.29 < 30 / side < 0.71
        sides.add(side)
        places.add((box["left"], box["top"]))
    assert len(sides) > 10
    assert len(places) > 40


def test_a_record_tells_where_the_thing_is():
    made, faults = Pasted().tokens(READERS, sample(), {"image": View(seed=3)})
    again, _ = Pasted().tokens(READERS, sample(), {"image": View(seed=4)})
    assert not faults
    (box,) = READERS["text"].restore(made["text"].map(lambda field: field[None]))["boxes"]
    dark = (made["image"].x.float().unflatten(1, (8, 8, 3)).mean((1, 2, 3)) < 200).view(4, 4)
    rows, columns = (dark.any(side).nonzero()[:, 0] / 4 for side in (1, 0))
    assert box["top"] - 0.3 < rows.min() <= box["bottom"]
    assert box["left"] - 0.3 < columns.min() <= box["right"]
    assert made["text"].x.tolist() != again["text"].x.tolist()
    still = [Pasted().tokens(READERS, sample(), {})[0]["text"].x.tolist() for _ in range(2)]
    assert still[0] == still[1]


def test_what_is_broken_or_has_no_picture_is_named_or_left_as_it_is():
    _, faults = Pasted().tokens(READERS, sample() | {"png": b"no"}, {})
    assert set(faults) == {"image"}
    facts = {"metadata": Facts(["source"])}
    assert bytes(Pasted().tokens(facts, sample(), {})[0]["metadata"].x.tolist()) == b"source: web\n\n"
    with pytest.raises(ValueError, match="smallest <= largest"):
        Pasted(share=(0.0, 2.0))
