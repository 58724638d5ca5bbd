"""Data sets saved by Hugging Face `datasets`, with pictures and sound as they were stored."""

import io
import json
import tarfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

import headwater
from headwater.tools.ingest.splits import split_of
from headwater.tools.shard import shard

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()
EMBEDDED = Path(headwater.__file__).parent / "embedded"
STORED = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


@pytest.fixture(scope="module")
def things() -> list[dict[str, bytes]]:
    """Members of the first embedded pictures with speech."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(EMBEDDED / "things-unseen-000.tar") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return [sample for sample in found.values() if {"png", "ogg", "txt"} <= sample.keys()][:6]


FEATURES = {
    "picture": datasets.Image(decode=False),
    "left eye": datasets.Image(),
    "album": datasets.List(datasets.Image()),
    "sound": datasets.Audio(decode=False),
    "caption": datasets.Value("string"),
    "hebrew": datasets.Value("string"),
    "label": datasets.ClassLabel(names=["cat", "dog"]),
    "mood": datasets.ClassLabel(names=["calm", "wild"]),
    "score": datasets.Value("float32"),
    "when": datasets.Value("timestamp[s]"),
    "path": datasets.List(datasets.Value("float32")),
    "frame": datasets.Array2D((2, 3), "float64"),
    "steps": datasets.List(datasets.List(datasets.Value("int64"))),
    "tags": datasets.List(datasets.Value("string")),
    "blob": datasets.Value("binary"),
}


def rows(things: list[dict[str, bytes]]) -> list[dict]:
    return [
        {
            "picture": {"bytes": thing["png"], "path": None},
            "left eye": {"bytes": thing["png"], "path": "eye.jpg"},
            "album": [{"bytes": thing["png"], "path": None}] * (n % 3),
            "sound": {"bytes": thing["ogg"], "path": "a.wav"},
            "caption": thing["txt"].decode(),
            "hebrew": "שלום",
            "label": n % 2 if n else None,
            "mood": 1,
            "score": float("nan") if n == 0 else n / 2,
            "when": datetime(2020, 1, 1),
            "path": [0.5] * (n + 1),
            "frame": [[1.0, 2, 3], [4, 5, 6]],
            "steps": [[n, 2], [3, 4]],
            "tags": ["a", "b"],
            "blob": b"\x00\x01",
        }
        for n, thing in enumerate(things)
    ]


def dataset(rows: list[dict]) -> datasets.Dataset:
    """Media go in as plain structs: encoding them would ask for torchcodec."""
    media = {name: STORED for name in ("picture", "left eye", "sound")} | {"album": datasets.List(STORED)}
    plain = datasets.Features({**FEATURES, **media})
    return datasets.Dataset.from_list(rows, features=plain).cast(datasets.Features(FEATURES))


def read(out: Path, split: str) -> list[dict]:
    tars = [str(path) for path in sorted(out.glob(f"{split}-*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)) if tars else []


def test_all_kinds_of_columns(things, tmp_path, capsys):
    dataset(rows(things)).save_to_disk(tmp_path / "in")
    shard(str(tmp_path / "in"), str(tmp_path / "out"))
    found = read(tmp_path / "out", "train")
    assert len(found) == len(things) == 6
    for n, (sample, thing) in enumerate(zip(found, things)):
        assert sample["png"] == sample["left_eye.png"] == thing["png"]
        assert sample["opus"] == thing["ogg"]
        assert sample["txt"] == thing["txt"]
        assert [name for name in sample if name.startswith("album")] == [f"album.{k}.png" for k in range(n % 3)]
        assert np.load(io.BytesIO(sample["npy"])).tolist() == [0.5] * (n + 1)
        assert np.load(io.BytesIO(sample["npy"])).dtype == np.float32
        assert np.load(io.BytesIO(sample["frame.npy"])).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert np.load(io.BytesIO(sample["steps.npy"])).dtype == np.int64
    assert "cls" not in found[0]
    assert (found[1]["cls"], found[2]["cls"]) == (b"1", b"0")
    expected = {"hebrew": "שלום", "label": "dog", "mood": "wild", "score": 0.5, "when": "2020-01-01 00:00:00", "tags": ["a", "b"]}
    assert json.loads(found[1]["json"]) == {**expected, "source": "row/00000001"}
    assert json.loads(found[0]["json"])["score"] is None
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog"]
    printed = capsys.readouterr().out
    assert (
        "Hugging Face data set, member columns: picture, left eye, album, sound, path, frame, steps, caption column: caption"
        in printed
    )
    assert "not taken, since they hold bytes of no known kind: blob" in printed


def test_splits_are_kept(things, tmp_path, capsys):
    whole = dataset(rows(things))
    parts = {"train": [0, 1], "train_more": [2], "dev": [3], "test": [4], "unlabelled": [5]}
    datasets.DatasetDict({name: whole.select(chosen) for name, chosen in parts.items()}).save_to_disk(tmp_path / "in")
    shard(str(tmp_path / "in"), str(tmp_path / "out"), caption="hebrew")
    counts = {split: len(read(tmp_path / "out", split)) for split in ("train", "validation", "test", "unlabelled")}
    assert counts == {"train": 3, "validation": 1, "test": 1, "unlabelled": 1}
    assert json.loads(read(tmp_path / "out", "train")[2]["json"])["source"] == "train_more/00000000"
    assert read(tmp_path / "out", "test")[0]["txt"].decode() == "שלום"
    assert "split dev: 1 rows, written as validation" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has splits of its own"):
        shard(str(tmp_path / "in"), str(tmp_path / "more"), train=0.5)
    with pytest.raises(SystemExit, match="holds 3 shards"):
        shard(str(tmp_path / "in"), str(tmp_path / "out"))
    shard(str(tmp_path / "in"), str(tmp_path / "out"), overwrite=True)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("train_sft", "train"), ("dev-clean", "validation"), ("val", "validation"), ("valid", "validation")),
        *(("evaluation", "validation"), ("test.other", "test"), ("validated", "validated"), ("devanagari", "devanagari")),
        *(("testmini", "testmini"), ("../up", "___up"), ("Unsupervised", "unsupervised")),
    ],
)
def test_names_of_splits(name, split):
    assert split_of(name) == split


def test_a_single_train_split_is_divided_and_shuffled_rows_keep_their_order(things, tmp_path):
    whole = dataset(rows(things)).shuffle(seed=1)
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "in", num_shards={"train": 2})
    shard(str(tmp_path / "in"), str(tmp_path / "out"), train=0.5)
    parts = [
        {json.loads(s["json"])["source"]: s["txt"].decode() for s in read(tmp_path / "out", p)} for p in ("train", "validation")
    ]
    assert all(parts)
    assert parts[0] | parts[1] == {f"train/{n:08d}": text for n, text in enumerate(whole["caption"])}


def test_rows_that_do_not_decode_are_named(things, tmp_path):
    broken = rows(things)
    broken[1]["picture"] = {"bytes": b"", "path": None}
    broken[2]["picture"] = {"bytes": things[0]["png"][:200], "path": None}
    broken[3]["sound"] = {"bytes": None, "path": str(tmp_path / "gone.wav")}
    broken[4]["caption"] = None
    (tmp_path / "gone.wav").write_bytes(b"")  # is stored as it is
    dataset(broken).save_to_disk(tmp_path / "in")
    shard(str(tmp_path / "in"), str(tmp_path / "out"))
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    reasons = {row["source"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons.keys() == {f"row/{n:08d}" for n in (1, 2, 3, 4)}
    assert "column picture: 0 bytes" in reasons["row/00000001"]
    assert reasons["row/00000003"] == "empty file (0 bytes)"
    assert "empty caption" in reasons["row/00000004"]


def test_only_a_path_is_read_from_there(things, tmp_path):
    (tmp_path / "a.png").write_bytes(things[0]["png"])
    soundfile.write(tmp_path / "b.flac", np.sin(np.arange(4000) / 9), 8000)
    table = {"image": [str(tmp_path / "a.png")], "audio": [str(tmp_path / "b.flac")], "n": [1]}
    found = datasets.Dataset.from_dict(table)
    found = found.cast_column("image", datasets.Image(decode=False)).cast_column("audio", datasets.Audio(decode=False))
    found.save_to_disk(tmp_path / "in")
    shard(str(tmp_path / "in"), str(tmp_path / "out"), size=20)
    (sample,) = read(tmp_path / "out", "train")
    assert max(Image.open(io.BytesIO(sample["png"])).size) == 20
    assert sample["flac"] == (tmp_path / "b.flac").read_bytes()
    (tmp_path / "secret.key").write_text("private")
    stolen = datasets.Dataset.from_dict({"image": [str(tmp_path / "secret.key"), str(tmp_path / "a.png")]})
    stolen.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "stolen")
    shard(str(tmp_path / "stolen"), str(tmp_path / "safe"))
    assert [sample["png"] for sample in read(tmp_path / "safe", "train")] == [things[0]["png"]]
    with pytest.raises(SystemExit, match="has no text column 'words'; it has none"):
        shard(str(tmp_path / "in"), str(tmp_path / "more"), caption="words")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'headwater\[data\]'"):
        shard(str(tmp_path), str(tmp_path / "out"))
