import json
import re

import matplotlib
import pytest
import torch
from PIL import ImageFont

from headwater.modalities.layout import Layout, LayoutReader
from headwater.model import Model
from headwater.objectives import Masked
from headwater.trunk import Trunk

TEXT = """Invoice 2041                      12 March 2024
Lamp, brass, 40 cm          2     89.00     178.00
Größe nach Maß              1     12.50      12.50
Total                                       190.50"""
PAGE = (600, 800)


@pytest.fixture(scope="module")
def page():
    """The words of an invoice with the boxes that a font gives them, in pixels."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 16)
    words, step = [], font.getlength("m")
    for number, line in enumerate(TEXT.splitlines()):
        for found in re.finditer(r"\S+", line):
            x0, y0, x1, y1 = font.getbbox(found[0])
            left, top = 20 + found.start() * step, 40 + 30 * number
            words.append({"text": found[0], "box": [left + x0, top + y0, left + x1, top + y1]})
    return {"size": PAGE, "words": words}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "total": 3, "190": 4, "##.": 5, "##50": 6})
    )
    made.normalizer = tokenizers.normalizers.Lowercase()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def row(t):
    return t.map(lambda field: field[None])


def test_every_id_has_the_box_of_its_word(page):
    reader = LayoutReader(length=512)
    t = reader.tokens(reader.decode({"layout.json": json.dumps(page).encode()}))
    ids = "".join(word["text"] for word in page["words"]).encode()
    assert t.x.tolist() == [*ids, 256]
    assert t.position[:, 0].tolist() == list(range(len(ids) + 1))
    x0, y0, x1, y1 = page["words"][0]["box"]
    expected = [round(1000 * x0 / 600), round(1000 * y0 / 800), round(1000 * x1 / 600), round(1000 * y1 / 800)]
    assert t.position[:7, 1:].tolist() == [expected] * 7
    assert t.position[-1, 1:].tolist() == [1000] * 4


def test_marks_have_the_boxes_of_layoutlm(tokenizer):
    reader = LayoutReader(tokenizer, 8, start="[CLS]", end="[SEP]")
    words = [{"text": "Total", "box": [1, 2, 30, 4]}, {"text": " ", "box": [0, 0, 9, 9]}, {"text": "190.50", "box": [50, 2, 80, 4]}]
    t = reader.tokens(words)
    assert t.x.tolist() == [1, 3, 4, 5, 6, 2]
    assert t.position[:, 1:].tolist() == [[0] * 4, [1, 2, 30, 4], *[[50, 2, 80, 4]] * 3, [1000] * 4]
    assert [word["box"] for word in reader.restore(row(t))] == [[1, 2, 30, 4], [50, 2, 80, 4]]
    assert LayoutReader(tokenizer, 4, start="[CLS]", end="[SEP]").tokens(words).x.tolist() == [1, 3, 4, 2]


def test_restore_gives_words_and_boxes_back(page):
    reader = LayoutReader(length=512)
    again = reader.restore(row(reader.tokens(page)))
    assert [word["text"] for word in again] == [word["text"] for word in page["words"]]
    assert torch.equal(reader.tokens(again).position, reader.tokens(page).position)


def test_the_length_needs_a_count_of_ids(page):
    reader, content = LayoutReader(length=512), json.dumps(page).encode()
    assert reader.length({"size": len(content)}) is None
    assert reader.length({"size": len(content), "tokens-bytes": reader.count(content)}) == len(reader.tokens(page).x)


def test_embeddings_are_those_of_layoutlm(page):
    """Words and boxes; what LayoutLM has beside these (index, segment, norm) is set to nothing."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.layoutlm.modeling_layoutlm import LayoutLMEmbeddings

    torch.manual_seed(0)
    config = transformers.LayoutLMConfig(vocab_size=258, hidden_size=16, max_2d_position_embeddings=1001, hidden_dropout_prob=0.0)
    theirs, ours = LayoutLMEmbeddings(config), Layout(Trunk(16, 1, heads=2))
    theirs.LayerNorm = torch.nn.Identity()
    for table in (theirs.position_embeddings, theirs.token_type_embeddings):
        torch.nn.init.zeros_(table.weight)
    names = {"across": "x", "down": "y", "wide": "w", "tall": "h"}
    for own, other in names.items():
        getattr(ours, own).weight = getattr(theirs, f"{other}_position_embeddings").weight
    ours.stem.weight.data[:] = theirs.word_embeddings.weight.data
    t = row(ours.reader.tokens(page))
    torch.testing.assert_close(ours.embed(t).x, theirs(t.x, t.position[..., 1:].long()))


def test_masked_words_know_where_they_stand(page):
    """Two words on a page; which one is hidden is told by its place alone."""
    torch.manual_seed(0)
    model = Model({"page": Layout(Trunk(32, 1, heads=2, position="none"))})
    objective = Masked(model, "page", ratio=0.5, mode="substitute")
    t = row(model.readers["page"].tokens([{"text": text, "box": [x, 10, x + 20, 30]} for text, x in (("a", 100), ("b", 700))]))
    t = t.map(lambda field: field[:, :2])
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=1e-2)
    for step in range(40):
        hidden = torch.tensor([[step % 2 == 0, step % 2 == 1]])
        batch = objective._hide({"page": t, "seed": torch.zeros(1, dtype=torch.int64)}, {"page": hidden}, {})
        loss = objective(model, batch)["masked"].total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("text", "no page"),
        ({"words": []}, "no page"),
        ({"size": [0, 5], "words": []}, "no page"),
        ([], "no word"),
        ([{"text": " ", "box": [0, 0, 1, 1]}], "no word"),
        ([{"text": "a"}], "box"),
        ([{"text": 3, "box": [0, 0, 1, 1]}], "box"),
        ([{"text": "a", "box": [0, 0, 1]}], "box"),
        ([{"text": "a", "box": [5, 0, 1, 1]}], "x0 <= x1"),
        ([{"text": "a", "box": [0, 0, 1, 1001]}], "1000 x 1000"),
        ({"size": [10, 10], "words": [{"text": "a", "box": [0, 0, 11, 1]}]}, "10 x 10"),
    ],
)
def test_wrong_pages_are_refused(page, message):
    with pytest.raises(ValueError, match=message):
        LayoutReader().tokens(page)
