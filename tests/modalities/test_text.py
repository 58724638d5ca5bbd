import copy
import pickle
import tarfile
from pathlib import Path

import pytest

from headwater.embedded import place
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


@pytest.mark.parametrize("limit", [1, 5, 77])
def test_the_length_of_bytes_follows_from_the_size(limit):
    reader = TextReader(length=limit)
    for text in ("a", "größer als 東京 🙂", "x" * 76, "x" * 77, "x" * 200):
        content = text.encode()
        assert reader.length({"size": len(content)}) == len(reader.tokens(text).x)
        assert reader.length({"size": 0, "tokens-bytes": reader.count(content)}) == len(reader.tokens(text).x)
    padded = b"  two words \n"
    assert TextReader().length({"size": len(padded)}) == len(TextReader().tokens(padded.decode()).x) + 4  # an upper bound
    assert TextReader().count(padded) == 9
    assert TextReader().length({"size": 0}) == 0


def test_the_length_in_a_tokenizer_needs_its_count(tokenizer):
    reader = TextReader(tokenizer, length=4)
    hint = f"tokens-{reader.digest}"
    for text in ("red", "red boat", "red boat red boat red", " boat\n"):
        count = reader.count(text.encode())
        assert reader.length({"size": 99, hint: float(count)}) == len(reader.tokens(text).x)
    assert reader.length({"size": 99, "words": 3, "tokens-bytes": 5}) is None


def test_the_digest_is_of_the_tokenizers_content(tokenizer, tmp_path):
    moved = tmp_path / "moved.json"
    moved.write_bytes(Path(tokenizer).read_bytes())
    assert TextReader(str(moved)).digest == TextReader(tokenizer).digest
    assert pickle.loads(pickle.dumps(TextReader(tokenizer))).digest == TextReader(tokenizer).digest
    moved.write_text(moved.read_text().replace("boat", "ship"))
    assert TextReader(str(moved)).digest != TextReader(tokenizer).digest
    assert TextReader().digest == "bytes"


def test_only_strings_are_texts():
    with pytest.raises(ValueError, match="int"):
        TextReader().tokens(5)


def test_the_length_of_embedded_texts_is_exact():
    for reader in (TextReader(), TextReader(length=9)):
        with tarfile.open(place("embedded:things-seen-000.tar")) as tar:
            for content in (tar.extractfile(m).read() for m in tar if m.name.endswith(".txt")):
                assert reader.length({"size": len(content)}) == len(reader.tokens(reader.decode({"txt": content})).x)
