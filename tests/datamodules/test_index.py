import os

import numpy as np
import pytest
from tars import make

from headwater.datamodules import index as indexing
from headwater.datamodules.files import File
from headwater.datamodules.index import BLOCK, index_path, load_index, save_index, scan, split_name
from headwater.datamodules.writer import ShardWriter

SAMPLES = {f"{k:03d}": {"txt": f"text {k}".encode(), **({"bin": bytes(range(k))} if k % 3 else {})} for k in range(8)}


@pytest.fixture
def tar(tmp_path):
    with ShardWriter(tmp_path / "{:03d}.tar") as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    return writer.shards[0]


def contents(index):
    with File(index.path) as file:
        return {str(key): index.read(file, row) for row, key in enumerate(index.keys)}


def test_the_index_of_the_writer_equals_a_scan(tar):
    written, scanned = load_index(tar), scan(tar, hashed=True)
    assert written.keys.equals(scanned.keys)
    for field in ("first", "kind", "block", "bytes", "hash"):
        assert np.array_equal(getattr(written, field), getattr(scanned, field)), field
    assert not scan(tar).hash.any()
    assert contents(written) == contents(scanned) == SAMPLES
    assert written.faults == scanned.faults == ()


def test_stock_webdataset_reads_what_we_write(tar):
    webdataset = pytest.importorskip("webdataset")
    samples = webdataset.WebDataset(str(tar), shardshuffle=False)
    stock = {s["__key__"]: {k: v for k, v in s.items() if k[:2] != "__"} for s in samples}
    assert stock == SAMPLES


def test_we_index_what_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})
    assert contents(load_index(tmp_path / "a.tar")) == SAMPLES


def test_same_samples_make_the_same_bytes(tar, tmp_path):
    with ShardWriter(tmp_path / "again-{}.tar") as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
    assert writer.shards[0].read_bytes() == tar.read_bytes()


def test_shards_close_when_full_and_appear_when_complete(tmp_path):
    with ShardWriter(tmp_path / "{}.tar", samples=3) as writer:
        for key, members in SAMPLES.items():
            writer.write(key, members)
        assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["0.tar", "1.tar"]
    assert [len(load_index(p)) for p in writer.shards] == [3, 3, 2]
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize("key", ["a.b", "", "folder/a.b"])
def test_keys_that_webdataset_would_cut_are_refused(tmp_path, key):
    with ShardWriter(tmp_path / "{}.tar") as writer, pytest.raises(ValueError, match="dot"):
        writer.write(key, {"txt": b""})


def test_a_key_is_written_once(tmp_path):
    with ShardWriter(tmp_path / "{}.tar") as writer:
        writer.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="before"):
            writer.write("a", {"txt": b""})


@pytest.mark.parametrize("cut", [BLOCK // 2, BLOCK + 3, 3 * BLOCK])
def test_a_cut_tail_costs_only_its_samples(tar, cut):
    last = load_index(tar).extent(7, ["bin"]).offset - BLOCK  # where the last member's header begins
    os.truncate(tar, last + cut if cut < 2 * BLOCK else last - cut)
    index = scan(tar)
    kept = contents(index)
    lost = {"007"} if cut < 2 * BLOCK else {"006", "007"}
    whole = {k: v for k, v in SAMPLES.items() if k not in lost}
    assert {k: kept[k] for k in whole} == whole
    assert all(SAMPLES[k].items() >= v.items() for k, v in kept.items())  # never half a member
    assert index.faults
    assert ("007" in kept) == (cut < BLOCK)  # a sample with a cut member is lost whole; of a cut header nobody knows


def test_a_stale_index_is_made_anew(tar):
    make(tar, [("x.txt", b"new" * 5000)])
    assert contents(load_index(tar)) == {"x": {"txt": b"new" * 5000}}
    again = index_path(tar).stat().st_mtime_ns
    assert load_index(tar).keys.to_pylist() == ["x"]
    assert index_path(tar).stat().st_mtime_ns == again  # and is kept


@pytest.mark.parametrize("damage", [b"", b"no index", None], ids=["empty", "other", "cut"])
def test_a_damaged_index_is_made_anew(tar, damage):
    path = index_path(tar)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    assert contents(load_index(tar)) == SAMPLES


def test_a_missing_index_is_made_and_stays(tar, monkeypatch):
    index_path(tar).unlink()
    assert contents(load_index(tar)) == SAMPLES
    monkeypatch.setattr(indexing, "scan", None)
    assert contents(load_index(tar)) == SAMPLES


def test_of_duplicate_members_the_first_is_kept_and_named(tmp_path):
    tar = make(tmp_path / "a.tar", [("k.txt", b"1"), ("k.txt", b"2"), ("j.txt", b"3")])
    index = scan(tar)
    assert contents(index) == {"k": {"txt": b"1"}, "j": {"txt": b"3"}}
    assert len(index.faults) == 1
    assert "k.txt" in index.faults[0]
    save_index(index)
    assert load_index(tar).faults == index.faults


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.txt", ("a", "txt")), ("d.x/a.seg.PNG", ("d.x/a", "seg.png")), ("a", ("a", "")), ("./a.b", ("./a", "b"))],
)
def test_names_are_cut_at_the_first_dot_of_the_file(name, parts):
    assert split_name(name) == parts


def test_a_missing_tar_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        load_index(tmp_path / "none.tar")


def test_the_index_of_another_library_is_left_alone(tar):
    theirs = np.arange(9, dtype=np.uint64).tobytes()  # Megatron-Energon keeps bare offsets under the same name
    index_path(tar).write_bytes(theirs)
    assert contents(load_index(tar)) == SAMPLES
    assert tar.with_name(f"{tar.name}.idx").read_bytes() == theirs
    assert index_path(tar).name == f"{tar.name}.headwater.idx"
    assert load_index(tar).keys.to_pylist() == list(SAMPLES)


def test_a_folder_that_cannot_be_written_to_costs_the_saving_only(tar, monkeypatch):
    def full(index):
        raise OSError(28, "No space left on device")

    index_path(tar).unlink()
    monkeypatch.setattr(indexing, "save_index", full)
    assert contents(load_index(tar)) == SAMPLES


@pytest.mark.parametrize(("key", "members"), [("../a", {"txt": b""}), ("a\nb", {"txt": b""}), ("a", {"txt": b"", "TXT": b""})])
def test_what_no_reader_would_take_is_not_written(tmp_path, key, members):
    with ShardWriter(tmp_path / "{}.tar") as writer, pytest.raises(ValueError, match=r"leads out|control|case"):
        writer.write(key, members)


def test_long_names_are_found_again(tmp_path):
    long = {f"{'k' * 150}{n}": {"txt": f"text {n}".encode()} for n in range(3)}
    with ShardWriter(tmp_path / "{}.tar") as writer:
        for key, members in long.items():
            writer.write(key, members)
    assert contents(load_index(writer.shards[0])) == contents(scan(writer.shards[0])) == long
