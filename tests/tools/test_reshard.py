"""`headwater reshard` and `merge`: the same bytes in other shards, with all that the indices noted, whole or not at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest

from headwater import cli
from headwater.datamodules.files import File, expand
from headwater.datamodules.index import load_index, scan
from headwater.datamodules.writer import ShardWriter
from headwater.tools import copying
from headwater.tools.index_shards import index_shards
from headwater.tools.merge import merge
from headwater.tools.reshard import reshard
from headwater.tools.verify import verify


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Embedded sets with hashes and lengths, in folders of their own."""
    monkeypatch.chdir(tmp_path)
    for folder, names in {"things": ("things-seen-000", "things-unseen-000"), "sounds": ("sounds-test-000",)}.items():
        Path(folder).mkdir()
        for name in names:
            shutil.copy(expand(f"embedded:{name}.tar")[0], folder)
    index_shards("things", jobs=1, measure=True)
    index_shards("sounds", jobs=1, measure=True)
    return tmp_path


def samples(pattern):
    """(key, members, hashes, hints) of all samples, in order."""
    out = []
    for path in expand(str(pattern)):
        index = load_index(path)
        assert index.faults == ()
        assert np.array_equal(index.hash, scan(path, hashed=True).hash)
        with File(path) as file:
            for row in range(len(index)):
                hints = {name: float(column[row]) for name, column in index.hints.items() if not np.isnan(column[row])}
                out.append((index.key(row), index.read(file, row), hints))
    return out


def write(pattern, contents, header=None, count=10_000):
    with ShardWriter(pattern, samples=count, header=header) as writer:
        for key, members in contents.items():
            writer.write(key, members, {"txt.score": float(len(key))})
    return writer.shards


def texts(keys, words="text of "):
    return {key: {"txt": f"{words}{key}".encode()} for key in keys}


def test_by_number_the_samples_stay_what_they_were(real):
    reshard("things/things-seen-*.tar", "new", samples=70)
    assert [len(load_index(path)) for path in expand("new")] == [70, 70, 20]
    assert samples("new") == samples("things/things-seen-*.tar")
    verify("new", decode=True, jobs=1)
    reshard("new", "again", samples=1000)
    assert samples("again") == samples("new")
    reshard("things/things-seen-*.tar", "twice", samples=70)
    assert [p.read_bytes() for p in sorted(Path("new").iterdir())] == [p.read_bytes() for p in sorted(Path("twice").iterdir())]


def test_stock_webdataset_reads_the_new_shards_and_we_copy_its(real):
    webdataset = pytest.importorskip("webdataset")
    reshard("sounds", "new", samples=10)
    stock = [
        (sample["__key__"], {name: content for name, content in sample.items() if name[:2] != "__"})
        for sample in webdataset.WebDataset(expand("new"), shardshuffle=False)
    ]
    assert stock == [(key, members) for key, members, _ in samples("sounds")]
    with webdataset.TarWriter("theirs-0.tar") as writer:
        for key, members in stock:
            writer.write({"__key__": key, **members})
    reshard("theirs-0.tar", "ours")
    assert [(key, members) for key, members, _ in samples("ours")] == stock


def test_tars_of_the_tar_program_long_names_included(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = texts(["a", "k" * 120, "sub/" * 30 + "b", "ünï" * 30])
    for key, members in contents.items():
        path = Path("files", f"{key}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members["txt"])
    subprocess.run(["tar", "-cf", "../own-1.tar", *(f"{key}.txt" for key in contents)], cwd="files", check=True)
    reshard("own-1.tar", "new")
    assert {key: members for key, members, _ in samples("new")} == contents


def test_from_an_object_store(real):
    store = fsspec.filesystem("memory")
    for path in Path("things").iterdir():
        store.pipe(f"/store/{path.name}", path.read_bytes())
    reshard("memory://store", "new", samples=100)
    assert samples("new") == samples("things")
    verify("memory://store", jobs=1)
    assert not Path("verify.jsonl").read_text()


def test_by_size(real):
    reshard("things", "new", size=100_000)
    sizes = [Path(path).stat().st_size for path in expand("new/things-seen-*.tar")]
    assert all(100_000 <= size < 120_000 for size in sizes[:-1])
    assert len(sizes) == 9


def test_sets_stay_apart_and_keys_choose(real):
    reshard("things", "new", key=r"^[a-c].*-twitter$")
    assert {path.name for path in Path("new").glob("*.tar")} == {"things-seen-00000.tar", "things-unseen-00000.tar"}
    kept = [key for key, *_ in samples("new")]
    assert kept == [key for key, *_ in samples("things") if re.search(r"^[a-c].*-twitter$", key)]
    assert 0 < len(kept) < 60
    with pytest.raises(ValueError, match="found no sample in 2 shards whose key holds 'zzz'"):
        reshard("things", "none", key="zzz")
    with pytest.raises(ValueError, match="expected a regular expression"):
        reshard("things", "none", key="(")
    assert not Path("none").exists()


def test_split_by_a_hash_of_the_key_as_shard_does(real):
    from headwater.tools.ingest.splits import place

    reshard("things", "new", split="train=0.8,validation=0.2")
    train, validation = samples("new/train-*.tar"), samples("new/validation-*.tar")
    assert {key for key, *_ in train} == {key for key, *_ in samples("things") if place(key) < 0.8}
    assert sorted(train + validation, key=lambda sample: sample[0]) == sorted(samples("things"), key=lambda sample: sample[0])
    assert 0.7 < len(train) / 250 < 0.9
    reshard("things/things-seen-*.tar", "fewer", split="train=0.8,validation=0.2")
    assert {key for key, *_ in samples("fewer/validation-*.tar")} < {key for key, *_ in validation}


@pytest.mark.parametrize("split", ["train=0.9", "train=0.5,train=0.5", "train,validation", "a/b=0.5,c=0.5", "a=1.5,b=-0.5", "a=x"])
def test_shares_that_make_no_sense(real, split):
    with pytest.raises(ValueError, match="expected names with shares that add up to 1"):
        reshard("things", "new", split=split)


def test_sorted_by_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a-{}.tar", texts(["d", "b", "f"]), count=1)
    write("a-9{}.tar", texts(["e", "a", "ä", "c"]), count=2)
    monkeypatch.setattr(copying, "OPEN", 2)
    reshard("a-*.tar", "new", sort="key", samples=4)
    assert [key for key, *_ in samples("new")] == ["a", "b", "c", "d", "e", "f", "ä"]
    assert all(members == {"txt": f"text of {key}".encode()} for key, members, _ in samples("new"))


def test_keys_that_repeat_get_the_name_of_their_shard(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("a-0{}.tar", texts("xy"))
    write("a-1{}.tar", texts("yz"))
    reshard("a-*.tar", "new", sort="key")
    assert [key for key, *_ in samples("new")] == ["a-00-x", "a-00-y", "a-10-y", "a-10-z"]
    assert "keys repeat: each gets the name of its shard, such as a-00-KEY" in capsys.readouterr().out
    verify("new")
    assert not Path("verify.jsonl").read_text()


def test_a_shard_has_the_header_of_its_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    headers = [{"licence": "CC0"}, {"licence": "MIT"}]
    for number, header in enumerate(headers):
        write(f"a-{number}{{}}.tar", texts(str(3 * number + k) for k in range(3)), header)
    reshard("a-*.tar", "new")
    assert [load_index(path).card.header for path in expand("new")] == headers
    assert [scan(path).card.header for path in expand("new")] == headers
    assert [len(load_index(path)) for path in expand("new")] == [3, 3]
    with pytest.raises(ValueError, match="headers that differ"):
        reshard("a-*.tar", "sorted", sort="key")


def test_changed_members_are_left_out_and_named(real):
    index = load_index("sounds/sounds-test-000.tar")
    content = bytearray(Path(index.path).read_bytes())
    extension, offset, _ = index.extent(4).members[1]
    content[offset + 5] ^= 1
    Path(index.path).write_bytes(content)
    before = [(key, members) for key, members, _ in samples_unchecked("sounds")]
    reshard("sounds", "new")
    assert [(key, members) for key, members, _ in samples("new")] == before[:4] + before[5:]
    line = json.loads(Path("new/skipped.jsonl").read_text())
    assert line["reason"] == f"sounds/sounds-test-000.tar: {index.key(4)}.{extension} has changed since its hash was taken"


def samples_unchecked(folder):
    for path in expand(folder):
        index = load_index(path)
        with File(path) as file:
            yield from ((index.key(row), index.read(file, row), {}) for row in range(len(index)))


def test_damaged_sources_are_told(real, capsys):
    tar = Path("things/things-unseen-000.tar")
    tar.write_bytes(tar.read_bytes()[: scan(tar).extent(30).offset + 3])
    reshard(str(tar), "new")
    assert len(samples("new")) == 30
    assert "is cut off" in capsys.readouterr().out
    assert "is cut off" in Path("new/skipped.jsonl").read_text()


def test_the_folder_is_replaced_only_when_asked(real):
    reshard("sounds", "new", samples=5)
    Path("new/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"new holds 7 shards; expected none; give another folder, or --overwrite"):
        reshard("things", "new")
    reshard("things/things-seen-*.tar", "new", overwrite=True)
    assert samples("new") == samples("things/things-seen-*.tar")
    assert sorted(path.name for path in Path("new").iterdir()) == [
        "notes.txt",
        "things-seen-00000.tar",
        "things-seen-00000.tar.idx",
    ]
    with pytest.raises(ValueError, match="holds the shards that are read"):
        reshard("things", "./things", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        reshard("things", "new/notes.txt")
    with pytest.raises(ValueError, match="is remote; expected a local folder"):
        reshard("things", "s3://bucket/new")


def test_a_run_that_is_killed_leaves_nothing_half_and_starts_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    write("a-{:03d}.tar", {f"{k:04d}": {"bin": draw.bytes(20_000)} for k in range(3000)}, count=500)
    command = [sys.executable, "-m", "headwater.cli", "reshard", str(tmp_path), "new", "--samples", "100"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("new.partial/*-00003.tar")) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not Path("new").exists()
    assert Path("new.partial").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert not Path("new.partial").exists()
    assert samples("new") == samples("a-*.tar")


def test_an_error_leaves_nothing_behind(real, monkeypatch):
    calls = []
    write_one = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", lambda *a: calls.append(1) or write_one(*a) if len(calls) < 50 else os.stat("/none"))
    with pytest.raises(FileNotFoundError):
        reshard("things", "new", samples=20)
    assert sorted(path.name for path in real.iterdir()) == ["sounds", "things"]


def test_memory_does_not_grow_with_the_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a-{:03d}.tar", {f"{k:02d}": {"bin": bytes([k]) * 1_000_000} for k in range(40)}, count=8)
    reshard("a-000.tar", "warm")
    tracemalloc.start()
    reshard("a-*.tar", "new")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_merged_sets_are_one(real):
    merge(["things/things-seen-*.tar", "sounds"], "all", samples=100)
    assert samples("all") == samples("things/things-seen-*.tar") + samples("sounds")
    assert [path.name for path in sorted(Path("all").glob("*.tar"))] == ["all-00000.tar", "all-00001.tar"]


def test_keys_that_repeat_get_the_name_of_their_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("birds/{}.tar", texts("01", "a bird "))
    write("cats.v2-{}.tar", texts("12", "a cat "))
    write("more/birds/{}.tar", texts("34", "more birds "))
    merge(["birds/", "cats.v2-*.tar", "more/birds"], "all")
    assert [key for key, *_ in samples("all")] == ["birds-0", "birds-1", "cats_v2-1", "cats_v2-2", "birds_2-3", "birds_2-4"]
    assert "keys repeat: each gets the name of its set, such as birds-KEY" in capsys.readouterr().out
    merge(["birds", "more/birds"], "unlike")
    assert [key for key, *_ in samples("unlike")] == ["0", "1", "3", "4"]
    write("more/birds/1{}.tar", texts("4", "the same key in another shard "))
    merge(["birds", "more/birds"], "deep")
    assert [key for key, *_ in samples("deep")] == ["birds-0-0", "birds-0-1", "birds_2-0-3", "birds_2-0-4", "birds_2-10-4"]


def test_splits_are_merged_split_by_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("a", "b")):
        write(f"{folder}/train-{{}}.tar", texts(f"{number}{k}" for k in range(3)))
        write(f"{folder}/validation-{{}}.tar", texts(f"{number}{k}" for k in range(3, 5)))
    merge(["a", "b"], "all")
    assert [key for key, *_ in samples("all/train-*.tar")] == ["00", "01", "02", "10", "11", "12"]
    assert [key for key, *_ in samples("all/validation-*.tar")] == ["03", "04", "13", "14"]
    write("c/other-{}.tar", texts("z"))
    with pytest.raises(ValueError, match=r"expected all sets with splits or none.*--split"):
        merge(["a", "c"], "mixed")


def test_copies_are_left_out_and_never_taken_from_the_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    same = {"txt": b"same", "json": b"{}"}
    write("a/train-{}.tar", {"0": same, "1": {"txt": b"same"}, "2": {"txt": b"other"}})
    write("a/validation-{}.tar", {"3": dict(reversed(same.items())), "4": {"txt": b"new"}})
    write("b/train-{}.tar", {"5": {"txt": b"other"}, "6": {"json": b"same"}})
    merge(["a", "b"], "all", dedupe=True)
    assert [key for key, *_ in samples("all/validation-*.tar")] == ["3", "4"]
    assert [key for key, *_ in samples("all/train-*.tar")] == ["1", "2", "6"]
    assert "2 of 7 samples are copies and are left out" in capsys.readouterr().out


def test_copies_are_found_where_no_hash_was_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copy(expand("embedded:things-unseen-000.tar")[0], f"{name}-0.tar")
        assert not load_index(f"{name}-0.tar").hash.any()
    merge(["a-0.tar", "b-0.tar"], "all", dedupe=True)
    assert len(samples("all")) == 90


def robot(folder, names, mean):
    slots = [{"name": name, "kind": "joint", "unit": "rad"} for name in names]
    return write(f"{folder}/{{}}.tar", texts([f"{folder}-{k}" for k in range(2)]), {"action": {"slots": slots, "mean": mean}})


def test_facts_of_sets_do_not_mix_and_slots_that_differ_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    robot("a", ["shoulder", "elbow"], [0, 1])
    robot("b", ["shoulder", "elbow"], [5, 5])
    robot("c", ["elbow", "shoulder"], [0, 1])
    merge(["a", "b"], "same")
    assert [load_index(path).card.header["action"]["mean"] for path in expand("same")] == [[0, 1], [5, 5]]
    with pytest.raises(
        ValueError, match=r"a/0.tar has the action slots shoulder, elbow, and c/0.tar elbow, shoulder; .*two sources"
    ):
        merge(["a", "c"], "mixed")
    assert not Path("mixed").exists()


def test_the_commands(real, capsys):
    cli.main(["reshard", "things", "new", "--samples=100", "--split", "train=0.9,validation=0.1"])
    cli.main(["merge", "things", "--samples", "1000", "sounds", "all", "--dedupe"])
    assert len(samples("all")) == 283
    printed = capsys.readouterr().out
    assert "validation" in printed
    with pytest.raises(SystemExit, match="headwater: all holds 1 shards"):
        cli.main(["merge", "things", "sounds", "all"])
    cli.main(["merge", "things", "sounds", "all", "--overwrite"])
    with pytest.raises(SystemExit):
        cli.main(["merge", "things"])
    assert "required" in capsys.readouterr().err
