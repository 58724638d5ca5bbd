import pytest
import torch
from torch.testing import assert_close

from headwater.hub import load_backbone, save_backbone
from headwater.modalities import Text
from headwater.model import Model
from headwater.surgery import reworded
from headwater.surgery.vocabulary import compared, letters, spellings
from headwater.tokens import Tokens
from headwater.tools.tokenizer import SPECIAL, train
from headwater.trunk import Trunk

LINES = ["the red dog sees the red boat", "a dog sings and the boat sees it", "über the größte boat"] * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, kind, size in (("small", "bpe", 275), ("large", "bpe", 300), ("unigram", "unigram", 300), ("words", "wordpiece", 80)):
        train(lambda: iter(LINES), kind, size, False, list(SPECIAL)).save(str(folder / f"{name}.json"))
    return {path.stem: str(path) for path in folder.glob("*.json")}


def text(tokenizer, tied=False, **more):
    torch.manual_seed(0)
    made = Text(Trunk(16, 1, 2, position="rotary"), tokenizer, length=24, tied=tied, **more)
    torch.nn.init.normal_(made.stem.weight)
    return made.eval()


def logits(encoder, ids):
    t = Tokens(torch.tensor([ids]), torch.arange(len(ids))[None, :, None])
    with torch.no_grad():
        return encoder.unembed(encoder(encoder.embed(t), True).x)[0]


@pytest.mark.parametrize("tied", [False, True])
def test_old_tokens_keep_their_logits(files, tied):
    old = text(files["small"], tied)
    new = reworded(old, files["large"])
    theirs, mine = spellings(old.reader), {what: i for i, what in spellings(new.reader).items()}
    ids = old.reader.tokens("the red dog").x.tolist()[:-1]
    place = [mine[theirs[i]] for i in range(old.reader.known)]
    made = logits(new, [place[i] for i in ids])
    assert_close(made[:, place], logits(old, ids)[:, : old.reader.known], rtol=0, atol=0)
    assert_close(made[:, new.reader.end], logits(old, ids)[:, old.reader.end], rtol=0, atol=0)
    assert new.words.kept == old.reader.known
    assert new.words.left == 0
    assert new.words.made == new.reader.known - old.reader.known
    assert len(new.reader.ids("the red dog sees the boat")) < len(old.reader.ids("the red dog sees the boat"))


@pytest.mark.parametrize("tokenizer", ["bytes", "small"])
def test_new_tokens_are_the_mean_of_their_pieces(files, tokenizer):
    old = text(files.get(tokenizer, tokenizer))
    new = reworded(old, files["large"])
    known = set(spellings(old.reader).values())
    number = max(i for i, what in spellings(new.reader).items() if isinstance(what, bytes) and what not in known)
    pieces = [int(i) for i in old.reader.ids(new.reader.text([number]))]
    assert len(pieces) > 1
    for name in ("stem.weight", "head.weight", "head.bias"):
        assert_close(new.state_dict()[name][number], old.state_dict()[name][pieces].mean(0))
    assert_close(new.stem.weight[-1], old.stem.weight[-1])  # what stands before the first token
    assert_close(new.stem.weight[new.reader.end], old.stem.weight[old.reader.end])
    unknown = new.reader._codec.token_to_id("<mask>")
    if tokenizer == "bytes":
        assert_close(new.stem.weight[unknown], old.stem.weight[: old.vocab].mean(0))


@pytest.mark.parametrize("pair", [("words", "large"), ("large", "words"), ("unigram", "words"), ("small", "unigram")], ids=str)
def test_any_tokenizer_in_place_of_any_other(files, pair, tmp_path):
    old = text(files[pair[0]], extra=2)
    new = reworded(old, files.get(pair[1], pair[1]))
    words = compared(old.reader, new.reader)
    assert len(words.rows) == new.vocab
    assert words.kept + words.made + words.unknown == new.reader.known
    assert words.kept + words.made > len(SPECIAL)
    assert words.rows[-2:] == [[i] for i in old.reader.extras]
    assert new.report.coverage == 1
    save_backbone(Model({"text": new}), tmp_path / "new")
    assert load_backbone(tmp_path / "new").model.encoder("text").vocab == new.vocab


def test_marks_that_were_ids_follow_their_token(files):
    old = text(files["small"], start="<start>", end=3)
    new = reworded(old, files["words"])
    assert new.reader.end == new.reader._codec.token_to_id("<end>")
    assert new.reader.start == new.reader._codec.token_to_id("<start>")
    with pytest.raises(ValueError, match="found no token '<end>'"):
        reworded(text(files["small"], end=3), "bytes")


def test_all_bytes_have_a_letter():
    assert sorted(letters().values()) == list(range(256))
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {letter: byte for byte, letter in bytes_to_unicode().items()} == letters()


def test_encoders_of_other_signals_are_refused():
    from headwater.modalities import Image

    with pytest.raises(ValueError, match="reads no texts"):
        reworded(Image(Trunk(16, 1, 2), size=16, patch=8), "bytes")
