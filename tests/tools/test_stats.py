"""`headwater stats`: the numbers of the indices, checked against the members themselves; and what repeats in a set."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from headwater import cli
from headwater.datamodules.files import File, expand
from headwater.datamodules.index import index_path, load_index
from headwater.datamodules.order import Order, quality
from headwater.datamodules.writer import ShardWriter
from headwater.tools.index_shards import index_shards
from headwater.tools.sets import content_prints, key_prints, repeated, sets_of, stem
from headwater.tools.stats import measure_set, short, stats


@pytest.fixture
def real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("things-seen-000", "things-unseen-000"):
        shutil.copy(expand(f"embedded:{name}.tar")[0], tmp_path / f"things-{len(os.listdir())}.tar")
    index_shards(".", jobs=1, measure=True)
    return tmp_path


def test_numbers_are_those_of_the_members(real):
    sizes, words = {}, []
    for path in expand("."):
        index = load_index(path)
        with File(path) as file:
            for row in range(len(index)):
                members = index.read(file, row)
                words.append(len(members["txt"].split()))
                for extension, content in members.items():
                    sizes.setdefault(extension, []).append(len(content))
    stats(".", json="stats.json")
    told = json.loads(Path("stats.json").read_text())["things-*.tar"]
    assert (told["shards"], told["samples"], told["faults"]) == (2, 250, 0)
    for extension, of in sizes.items():
        expected = {"count": 250, "total": sum(of), "min": min(of), "median": np.median(of), "max": max(of)}
        assert told["members"][extension] == expected
    assert told["hints"]["txt.words"]["known"] == 250
    assert told["hints"]["txt.words"]["median"] == np.median(words)
    assert told["hints"]["png.width"]["min"] == told["hints"]["png.width"]["max"] == 64
    counts = [len(load_index(path)) for path in expand(".")]
    assert told["shuffle"] == pytest.approx(quality(Order(counts, seed=0), 256)._asdict())
    size = sum(index_path(path).stat().st_size for path in expand("."))
    assert told["index_bytes_per_sample"] == pytest.approx(size / 250)
    assert (told["copies"], told["hashed"]) == (0, 250)


def test_contents_are_not_read(real):
    before = measure_set(expand("."))
    for path in expand("."):
        size = os.path.getsize(path)
        os.truncate(path, 0)
        os.truncate(path, size)  # nothing but zeros
    assert measure_set(expand(".")) == before


def test_copies_and_headers_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slots = [{"name": "elbow", "kind": "joint", "unit": "rad"}, {"name": "hand", "kind": "gripper", "unit": ""}]
    header = {"action": {"slots": slots, "mean": [0, 0]}, "licence": "CC0", "story": "x" * 100}
    with ShardWriter("a-{}.tar", samples=2, header=header) as writer:
        for key, text in zip("0123", (b"one", b"two", b"one", b"one")):
            writer.write(key, {"txt": text})
    cli.main(["stats", "."])
    printed = capsys.readouterr().out
    assert "2 of 4 samples are copies of others" in printed
    assert 'header of 2 shards: action 2 slots (1 joint, 1 gripper); licence "CC0"; story (102 characters)' in printed
    assert short("fps", None) == "fps null"


def test_shards_without_hashes_or_samples(tmp_path, capsys):
    shutil.copy(expand("embedded:things-unseen-000.tar")[0], tmp_path / "a-0.tar")
    (tmp_path / "b-0.tar").write_bytes(bytes(1024))
    stats(str(tmp_path))
    printed = capsys.readouterr().out
    assert "0 of 0 samples are copies of others; 90 have no hash, `headwater index` takes it" in printed
    assert "b-*.tar: 1 shards, 0 samples" in printed


def test_names_of_sets():
    assert sets_of(["out/train-00.tar", "out/train-01.tar", "out/x.tar"]) == ["train-*.tar", "train-*.tar", "x.tar"]
    assert sets_of(["a/0.tar", "b/0.tar"]) == ["a/*.tar", "b/*.tar"]
    assert [stem(path) for path in ("out/train-00.tar", "s3://b/x_3.tar", "00.tar", "a1b.tar")] == ["train", "x", "", "a1b"]


def test_prints_tell_contents_apart_whatever_their_order(tmp_path):
    samples = [
        {"txt": b"a", "json": b"b"},
        {"json": b"b", "txt": b"a"},
        {"txt": b"b", "json": b"a"},
        {"txt": b"a"},
        {"text": b"a"},
        {"txt": b"a", "json": b"b", "cls": b"a"},
    ]
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for number, members in enumerate(samples):
            writer.write(f"{number}", members)
    index = load_index(writer.shards[0])
    prints = content_prints(index)
    assert prints[0] == prints[1]
    assert len({*prints.tolist()}) == 5
    assert repeated([prints[:1], prints[1:]]).tolist() == [prints[0]]
    assert repeated([prints[1:]]).tolist() == []
    assert repeated([]).tolist() == []
    assert repeated([np.zeros(3, np.uint64)]).tolist() == [], "0 is unknown"
    assert len({*key_prints(index).tolist()}) == 6
