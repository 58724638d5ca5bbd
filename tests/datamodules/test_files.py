"""Shards on object stores: by ranges, through a bounded cache, and as streams when nothing better is possible."""

import os
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import fsspec
import numpy as np
import pytest

from headwater.datamodules import files
from headwater.datamodules.files import Cache, File, expand, insist, is_remote
from headwater.datamodules.mixture import Ledger
from headwater.datamodules.plan import Plan
from headwater.datamodules.shards import ShardDataset
from headwater.datamodules.sources import OpenSource, Source
from headwater.datamodules.stream_source import StreamSource, is_stream, open_source
from headwater.datamodules.writer import ShardWriter
from headwater.modalities.text import TextReader

READERS = {"text": TextReader()}


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "shards" / "a-{:03d}.tar", samples=10) as writer:
        for k in range(40):
            writer.write(f"{k:03d}", {"txt": f"text {k}".encode(), "json": b"{}"})
    return tmp_path / "shards"


@pytest.fixture
def bucket(shards):
    """The shards with their indices in a store that fsspec opens."""
    store = fsspec.filesystem("memory")
    if store.exists("/bucket"):  # of another test
        store.rm("/bucket", recursive=True)
    for file in shards.iterdir():
        store.pipe(f"/bucket/{file.name}", file.read_bytes())
    yield "memory://bucket"
    store.rm("/bucket", recursive=True)


@pytest.fixture
def site(shards):
    """The shards without their indices, and without ranges, on a web server of this machine."""
    for index in shards.glob("*.idx"):
        index.unlink()
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = None
    SimpleHTTPRequestHandler.log_message = lambda *_: None
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def texts(source, count):
    read = source.read(np.arange(count))
    return [source.readers["text"].restore(r.sample["text"].map(lambda f: f[None])) for r in read]


def test_what_is_remote():
    assert [is_remote(p) for p in ("s3://a/b.tar", "pipe:cat x", "https://a/b.tar")] == [True] * 3
    assert [is_remote(p) for p in ("/a/b.tar", "b.tar", "file:///a/b.tar", "embedded:x")] == [False] * 4


def test_patterns_on_a_store(bucket):
    names = [f"memory://bucket/a-{k:03d}.tar" for k in range(4)]
    assert [u.replace("///", "//") for u in expand(f"{bucket}/a-*.tar")] == names
    assert [u.replace("///", "//") for u in expand(bucket)] == names
    assert expand(f"{bucket}/a-{{000..003}}.tar") == names
    with pytest.raises(FileNotFoundError, match="expected a tar"):
        expand(f"{bucket}/b-*.tar")


def test_ranges_and_cache_give_the_order_of_local_files(shards, bucket, tmp_path):
    local = OpenSource("s", Source(str(shards)), READERS, 0, 2)
    ranges = OpenSource("s", Source(bucket), READERS, 0, 2)
    cached = OpenSource("s", Source(bucket, cache=str(tmp_path / "cache")), READERS, 0, 2)
    assert texts(local, 60) == texts(ranges, 60) == texts(cached, 60)
    assert sorted(texts(local, 40)) == sorted(f"text {k}" for k in range(40))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_remote_shard_without_index_is_indexed_in_the_cache(bucket, tmp_path):
    store = fsspec.filesystem("memory")
    for path in store.glob("/bucket/*.idx"):
        store.rm(path)
    source = open_source("s", Source(bucket, cache=str(tmp_path / "cache")), READERS, 0, 2)
    assert isinstance(source, OpenSource)
    assert sorted(texts(source, 40)) == sorted(f"text {k}" for k in range(40))
    assert is_stream(Source(bucket))


def test_the_cache_is_bounded_and_knows_urls_apart(bucket, tmp_path):
    store = fsspec.filesystem("memory")
    size = store.info("/bucket/a-000.tar")["size"]
    store.pipe("/bucket/other/a-000.tar", bytes(size))
    cache = Cache(str(tmp_path), 2 * size)
    first = cache.path(f"{bucket}/a-000.tar")
    assert cache.path(f"{bucket}/other/a-000.tar") != first
    os.utime(first, (1, 1))
    with File(first) as held:
        cache.path(f"{bucket}/a-001.tar")
        assert not Path(first).exists()  # the one that was not used for longest made room
        assert held.read(0, 9) == b"000.txt\0\0"  # and who reads it goes on reading
    assert sum(p.stat().st_size for p in tmp_path.glob("*.tar")) <= 2 * size
    assert Path(cache.path(f"{bucket}/a-000.tar")).exists()


def test_shards_of_the_next_window_are_fetched_before_they_are_asked_for(bucket, tmp_path):
    cache = Cache(str(tmp_path))
    cache.prefetch([f"{bucket}/a-{k:03d}.tar" for k in range(3)])
    for thread in list(cache._threads.values()):
        thread.join()
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_a_store_that_fails_now_and_then_is_asked_again(monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: pauses.append(seconds))
    pauses, answers = [], iter([TimeoutError(), ConnectionResetError(), b"content"])

    def attempt():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert insist(attempt) == b"content"
    assert pauses == [1, 2]

    def never():
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError):
        insist(never)

    def missing():
        pauses.append("asked")
        raise FileNotFoundError("x")

    pauses.clear()
    with pytest.raises(FileNotFoundError):
        insist(missing)
    assert pauses == ["asked"]


def test_a_shard_that_is_gone_costs_its_samples_only(bucket):
    store = fsspec.filesystem("memory")
    source = OpenSource("s", Source(bucket), READERS, 0, 0)
    store.rm("/bucket/a-001.tar")
    assert [bool(one.faults) for one in source.read(np.arange(40))] == [k // 10 == 1 for k in range(40)]


def test_a_cut_range_is_a_fault_of_its_sample(bucket):
    store = fsspec.filesystem("memory")
    content = store.cat("/bucket/a-001.tar")
    source = OpenSource("s", Source(bucket), READERS, 0, 0)
    store.pipe("/bucket/a-001.tar", content[: 512 * 7])
    read = source.read(np.arange(40))
    lost = [k for k, one in enumerate(read) if one.faults]
    assert lost
    assert set(lost) <= set(range(10, 20))
    assert "holds" in read[lost[0]].faults[0]


@pytest.mark.parametrize("pattern", ["pipe:cat {}/a-{{000..003}}.tar", "{}/a-{{000..003}}.tar"], ids=["pipe", "http"])
def test_streams_are_read_through_webdataset(pattern, shards, site):
    source = open_source("s", Source(pattern.format(shards if "pipe" in pattern else site)), READERS, 0, 2)
    assert isinstance(source, StreamSource)
    assert len(source.lost) == 3
    read = source.read(np.arange(80))
    seen = [READERS["text"].restore(r.sample["text"].map(lambda f: f[None])) for r in read]
    first, second = ({r.number: r.seed for r in part} for part in (read[:40], read[40:]))
    assert first.keys() == second.keys()
    assert all(first[n] != second[n] for n in first)  # another view and mask each time round
    assert seen[:40] != seen[40:]  # and another order
    assert set(seen) == {f"text {k}" for k in range(40)}
    assert all(seen.count(text) == 2 for text in seen)


def test_ranks_share_a_stream(shards, monkeypatch):
    pattern = Source(f"pipe:cat {shards}/a-{{000..003}}.tar")
    seen = []
    for rank in range(3):
        monkeypatch.setattr("headwater.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("headwater.distributed.world", lambda: 3)
        data = ShardDataset(Plan([open_source("s", pattern, READERS, 0, 2)], Ledger([1.0]), 9), rank, 3, 0, 5)
        batches = list(data)
        assert [len(b["sample"]) for b in batches] == [3] * 5
        seen += [i for b in batches for i in b["sample"].tolist()][:10]
    assert len(set(seen)) == 30  # no rank reads what another one reads


def test_a_stream_that_gives_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="gave no sample"):
        open_source("s", Source(f"pipe:cat {tmp_path}/none.tar"), READERS, 0, 2)


def test_streams_cannot_be_packed(shards):
    source = open_source("s", Source(f"pipe:cat {shards}/a-000.tar"), READERS, 0, 2)
    with pytest.raises(ValueError, match="cannot be packed"):
        Plan([source], Ledger([1.0]), 4, pack={"text": 50}).step(0)
