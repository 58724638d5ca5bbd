"""`headwater verify`: every planted fault is named with its shard and sample, and quarantine loses nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tars import make

from headwater import cli
from headwater.datamodules.files import File, expand
from headwater.datamodules.index import BLOCK, index_path, load_index, scan
from headwater.datamodules.writer import ShardWriter
from headwater.tools import quarantine as quarantining
from headwater.tools.checks import BROKEN, check
from headwater.tools.index_shards import index_shards
from headwater.tools.verify import verify


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Two embedded sets with hashes and lengths in their indices."""
    monkeypatch.chdir(tmp_path)
    for name in ("things-unseen-000", "sounds-test-000"):
        shutil.copy(expand(f"embedded:{name}.tar")[0], tmp_path)
    index_shards(str(tmp_path), jobs=1, measure=True)
    return tmp_path


@pytest.fixture
def things(real):
    (real / "sounds-test-000.tar").unlink()
    return real / "things-unseen-000.tar"


def members(path):
    index = load_index(path)
    with File(str(path)) as file:
        return {index.key(row): index.read(file, row) for row in range(len(index))}


def found(path, **options):
    """(kind, key, member) of all problems of a shard."""
    return [(problem.kind, problem.key, problem.member) for problem in check(str(path), **options).problems]


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def listed():
    return [json.loads(line) for line in Path("verify.jsonl").read_text("utf-8").splitlines()]


def test_sound_shards_pass(real, capsys):
    verify(str(real), jobs=2, decode=True)
    assert listed() == []
    printed = capsys.readouterr().out
    assert "ogg: Hz 16000 (123)" in printed
    assert "ogg: channels 1 (123)" in printed


def test_any_byte_of_any_member_that_changes_is_found(things):
    whole, index = things.read_bytes(), load_index(things)
    draw = np.random.default_rng(0)
    for row, part, place in zip(draw.integers(0, len(index), 25), draw.integers(0, 4, 25), draw.random(25)):
        extension, offset, size = index.extent(int(row)).members[part]
        flip(things, offset + int(place * size))
        assert found(things) == [("hash", index.key(int(row)), extension)]
        things.write_bytes(whole)
    assert found(things) == []


def test_any_byte_of_a_header_that_changes_is_found(things):
    whole, index = things.read_bytes(), load_index(things)
    draw = np.random.default_rng(1)
    for member, place in zip(draw.integers(0, len(index.block), 25), draw.integers(0, 345, 25)):  # magic and prefix included
        flip(things, int(index.block[member]) * BLOCK - BLOCK + int(place))
        assert {kind for kind, _, _ in found(things)} & {*BROKEN}
        things.write_bytes(whole)


def test_members_that_do_not_decode_or_are_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with ShardWriter("a-{}.tar") as writer:
        writer.write("good", {"txt": b"a dog", "json": b"{}"})
        writer.write("bad", {"txt": b"\xff", "json": b"{", "png": b"?", "wav": b"?", "mp4": b"?", "npy": b"?"})
        writer.write("empty", {"txt": b"", "json": b"{}"})
    assert found("a-0.tar") == [("empty", "empty", "txt")]
    broken = {("decode", "bad", e) for e in ("txt", "json", "png", "wav", "mp4", "npy")} | {("empty", "empty", "txt")}
    assert {*found("a-0.tar", decode=True)} == broken
    with pytest.raises(SystemExit, match="broken: 7; verify"):
        verify("a-0.tar", decode=True)
    assert {(line["kind"], line["key"], line["member"]) for line in listed()} == broken
    assert all(line["broken"] and line["why"] for line in listed())
    first = Path("verify.jsonl").read_text()
    with pytest.raises(SystemExit):
        verify("a-0.tar", decode=True)
    assert Path("verify.jsonl").read_text() == first, "two runs say the same"


def test_notes_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ShardWriter("a-{}.tar", samples=4) as writer:
        for key in ("x1", "X1", "x2", "x3", "x1", "x4"):
            writer.write(key, {"txt": b"t", **({"json": b"{}"} if key != "x3" else {})})
        writer.write("p", {"txt": b"t", "json": b"{}", "pyd": b"\x80\x04.", "beats": b"1"})
    verify("a-*.tar", jobs=1)
    notes = {(line["shard"], line["kind"], line["key"], line["member"]) for line in listed()}
    assert notes == {
        ("a-0.tar", "case", "x1", ""),
        ("a-0.tar", "lacking", "", "json"),
        ("a-0.tar", "key", "x1", ""),
        ("a-1.tar", "pickle", "", "pyd"),
        ("a-1.tar", "unknown", "", "beats"),
    }


def test_an_index_that_is_missing_or_of_another_tar(things):
    index, saved = index_path(things), index_path(things).read_bytes()
    index.unlink()
    assert found(things) == [("no index", "", "")]
    assert not index.exists(), "verify only looks"
    with ShardWriter(things.with_name("b-{}.tar")) as writer:
        writer.write("0", {"txt": b"t"})
    shutil.copy(index_path(writer.shards[0]), index)
    assert found(things) == [("index", "", "")]
    index.write_bytes(saved[: len(saved) // 2])
    assert found(things) == [("index", "", "")]
    index.unlink()
    load_index(things)
    assert found(things) == [("no hashes", "", "")]


def test_tars_that_are_cut_hostile_or_written_twice(tmp_path):
    tar = make(
        tmp_path / "a.tar",
        [("a.txt", b"1"), ("../b.txt", b"2"), ("a.txt", b"3"), ("c.txt", b"4" * 2000), ("d.txt", b"5")],
    )
    kinds = [problem.why for problem in check(str(tar)).problems if problem.kind == "tar"]
    assert len(kinds) == 2
    assert "leads out of its folder" in kinds[0]
    assert "twice" in kinds[1]
    tar.write_bytes(tar.read_bytes()[:4000])
    assert any("cut off" in problem.why for problem in check(str(tar)).problems)


def test_what_cannot_be_read_does_not_stop_the_others(real, monkeypatch):
    unreadable = "things-unseen-000.tar"
    opens = os.open
    monkeypatch.setattr(os, "open", lambda path, *flags: opens("/none" if str(path).endswith(unreadable) else path, *flags))
    with pytest.raises(SystemExit, match="broken: 1;"):
        verify("*.tar", jobs=1)
    assert [(line["kind"], line["shard"]) for line in listed()] == [("unreadable", unreadable)]


def test_interleaved_samples_are_what_stock_webdataset_cuts(tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    named = [*((f"{k}.txt", b"t") for k in range(3)), *((f"{k}.json", b"{}") for k in range(3))]
    make("by-kind-0.tar", named)
    index_shards("by-kind-0.tar")
    assert found("by-kind-0.tar") == [("interleaved", str(k), "") for k in range(3)]
    assert stock(webdataset, "by-kind-0.tar") == [{"txt"}, {"txt"}, {"txt"}, {"json"}, {"json"}, {"json"}]
    verify("by-kind-0.tar", quarantine="aside")
    assert stock(webdataset, "by-kind-0.tar") == [{"txt", "json"}] * 3
    assert found("by-kind-0.tar") == []


def stock(webdataset, path):
    samples = webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
    return [{name for name in sample if name[:2] != "__"} for sample in samples]


def test_quarantine_moves_broken_samples_and_nothing_else(things, capsys):
    before, index = members(things), load_index(things)
    worse = [index.key(row) for row in (3, 41)]
    for row in (3, 41):
        flip(things, index.extent(row).members[1][1])
    damaged = members(things)
    verify(str(things), quarantine="aside")
    assert members(things) == {key: content for key, content in before.items() if key not in worse}
    anew = load_index(things)
    assert anew.hash.all()
    kept = [row for row in range(len(index)) if index.key(row) not in worse]
    assert all(np.array_equal(anew.hints[name], index.hints[name][kept]) for name in index.hints)
    assert members("aside/things-unseen-000-000.tar") == {key: damaged[key] for key in worse}
    notes = [json.loads(line) for line in Path("aside/quarantine.jsonl").read_text().splitlines()]
    assert [(note["shard"], note["key"], note["in"]) for note in notes] == [
        (str(things), key, "things-unseen-000-000.tar") for key in worse
    ]
    assert all("has changed" in note["why"][0] for note in notes)
    verify(str(things), decode=True)
    assert sorted(path.name for path in things.parent.iterdir() if path.is_file()) == [
        "sounds-test-000.tar.idx",
        things.name,
        index_path(things).name,
        "verify.jsonl",
    ]


def test_a_second_quarantine_writes_beside_the_first(things):
    for number in range(2):
        flip(things, load_index(things).extent(0).members[0][1])
        verify(str(things), quarantine="aside")
        assert len(load_index(f"aside/things-unseen-000-{number:03d}.tar")) == 1
    assert len(Path("aside/quarantine.jsonl").read_text().splitlines()) == 2


def test_the_old_tar_is_kept_when_bytes_of_it_belong_to_no_sample(things):
    whole = things.read_bytes()
    cut = load_index(things).extent(50).offset + 7
    things.write_bytes(whole[:cut])
    verify(str(things), quarantine="aside")
    assert Path("aside/things-unseen-000-000.damaged").read_bytes() == whole[:cut]
    assert len(load_index(things)) == 50
    assert scan(things).faults == ()


def test_a_shard_of_which_nothing_is_left_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ShardWriter("a-{}.tar") as writer:
        writer.write("0", {"png": b"?"})
    verify("a-0.tar", decode=True, quarantine="aside")
    assert not Path("a-0.tar").exists()
    assert not Path("a-0.tar.idx").exists()
    assert members("aside/a-0-000.tar") == {"0": {"png": b"?"}}


@pytest.mark.parametrize("moment", range(6))
def test_a_quarantine_that_is_stopped_is_started_again(things, monkeypatch, moment):
    index = load_index(things)
    flip(things, index.extent(5).members[0][1])
    now, steps = members(things), []

    def stopped(*arguments):
        steps.append(arguments)
        if len(steps) > moment:
            raise KeyboardInterrupt
        return os_replace(*arguments)

    os_replace = os.replace
    monkeypatch.setattr(quarantining.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        verify(str(things), quarantine="aside")
    monkeypatch.undo()
    assert len(members(things)) in (len(now), len(now) - 1), "the shard is the old or the new one, never in between"
    assert scan(things).faults == ()
    monkeypatch.chdir(things.parent)
    verify(str(things), quarantine="aside")
    assert members(things) == {key: content for key, content in now.items() if key != index.key(5)}
    assert {*load_index(things).hints} == {*index.hints}
    kept = [members(path) for path in sorted(Path("aside").glob("*.tar"))]
    assert all(one == {index.key(5): now[index.key(5)]} for one in kept)
    assert len(kept) >= 1


def test_quarantine_wants_a_folder_of_its_own_and_local_shards(things):
    with pytest.raises(ValueError, match="is the folder of the shards"):
        verify(str(things), quarantine=str(things.parent))
    with pytest.raises(ValueError, match="is remote"):
        verify("memory://bucket/a.tar", quarantine="aside")


def test_the_command(real, capsys):
    cli.main(["verify", str(real), "--decode", "--jobs=1", "--report", "all.jsonl"])
    assert Path("all.jsonl").read_text() == ""
    flip(real / "sounds-test-000.tar", load_index(real / "sounds-test-000.tar").extent(0).offset)
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", str(real), "--jobs", "1"])
    assert "broken: 1;" in str(stop.value.code)
