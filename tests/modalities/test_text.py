import copy
import pickle

import pytest

from headwater.modalities.text import Text, TextReader
from headwater.trunk import Trunk


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red": 0, "boat": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def row(t):
    return t.map(lambda field: field[None])


def test_bytes_are_utf8_and_end_with_the_end():
    t = TextReader().tokens(" añ \n")
    assert t.x.tolist() == [97, 0xC3, 0xB1, 256]
    assert t.position[:, 0].tolist() == [0, 1, 2, 3]
    assert TextReader().vocab == 257


@pytest.mark.parametrize("text", ["a", "größer als 東京 🙂", "two words"])
def test_restore_is_the_inverse(text):
    assert TextReader().restore(row(TextReader().tokens(text))) == text


def test_long_texts_are_cut_but_keep_their_end():
    t = TextReader(length=4).tokens("abcdefgh")
    assert t.x.tolist() == [97, 98, 99, 256]
    assert TextReader(length=4).restore(row(TextReader(length=4).tokens("aaañ"))) == "aaa"
    assert TextReader(length=5).restore(row(TextReader(length=5).tokens("aaañ"))) == "aaa\N{REPLACEMENT CHARACTER}"  # cut inside ñ


def test_a_tokenizer_file_is_used_and_does_not_travel_open(tokenizer):
    reader = TextReader(tokenizer)
    assert reader.tokens("red boat blue").x.tolist() == [0, 1, 2, 3]
    assert reader.vocab == 4
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        assert "_codec" not in vars(other)
        assert other.tokens("boat").x.tolist() == [1, 3]
        assert other.restore(row(other.tokens("red boat"))) == "red boat"


def test_the_start_token_has_a_row_of_its_own(tokenizer):
    encoder = Text(Trunk(16, 1, heads=2), tokenizer)
    assert encoder.start == 4
    assert encoder.stem.num_embeddings == 5
    assert encoder.head.out_features == 4  # and is never an answer


def test_unusable_texts_and_tokenizers_are_refused():
    with pytest.raises(ValueError, match="empty"):
        TextReader().tokens(" \n")
    with pytest.raises(UnicodeDecodeError):
        TextReader().decode({"txt": b"\xff\xfe"})
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        TextReader("none.json")
