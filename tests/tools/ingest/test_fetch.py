"""Manifests of URLs: every kind of failure against a local server, and being stopped at any moment."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
import webdataset

import headwater
from headwater.tools.ingest.fetch import Fetch, fetch_all
from headwater.tools.ingest.ledger import Entry, Ledger
from headwater.tools.ingest.signatures import BEGINNINGS
from headwater.tools.ingest.turns import PATIENCE, Turns
from headwater.tools.shard import shard

QUICK = Fetch(threads=8, timeout=0.4, attempts=3, pause=0.02, largest=200_000)
EMBEDDED = Path(headwater.__file__).parent / "embedded"


def pictures(count: int) -> list[bytes]:
    with tarfile.open(EMBEDDED / "things-unseen-000.tar") as tar:
        found = (tar.extractfile(member).read() for member in tar if member.name.endswith(".png"))
        return [content for content, _ in zip(found, range(count))]


class Server(ThreadingHTTPServer):
    """Answers by path; counts what was asked, when, and how many at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.times: list[tuple[str, float]] = []
        self.together = self.most = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.pictures = pictures(12)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed or gave up


class Handler(BaseHTTPRequestHandler):
    """The path says how to behave: /7.png is a picture, /flaky/7.png fails twice first, /404/7.png is missing."""

    def do_GET(self) -> None:
        server, path = self.server, self.path
        with server.lock:
            server.asked[path] += 1
            server.times.append((path, time.monotonic()))
            server.together += 1
            server.most = max(server.most, server.together)
        try:
            time.sleep(server.delay)
            self.answer(path.split("/")[1], server.asked[path], path)
        finally:
            with server.lock:
                server.together -= 1

    def answer(self, kind: str, time_asked: int, path: str) -> None:
        number = "".join(c for c in path.rpartition("/")[2] if c.isdecimal()) or "0"
        content = self.server.pictures[int(number) % len(self.server.pictures)]
        headers = {}
        if kind.isdecimal():
            return self.say(int(kind), b"no")
        if kind == "flaky" and time_asked <= 2:
            return self.say(503, b"later")
        if kind == "busy" and time_asked == 1:
            return self.say(429, b"slow down", {"Retry-After": "1"})
        if kind == "closed":
            return self.say(429, b"come back tomorrow", {"Retry-After": "86400"})
        if kind == "redirect":
            return self.say(302, b"", {"Location": f"/{number}.png"})
        if kind == "page":
            content = b"<!DOCTYPE html><html>not found, but politely</html>"
        if kind == "big":
            content += bytes(QUICK.largest)
        if kind == "noai":
            headers = {"X-Robots-Tag": "noai, noimageai"}
        if kind == "cut" or (kind == "cutonce" and time_asked == 1):
            headers["Content-Length"] = str(len(content) + 100)
        if kind == "slow":
            time.sleep(3 * QUICK.timeout)
        return self.say(200, content, headers)

    def say(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def manifest(path: Path, urls: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_url", "caption", "license"])
        writer.writerows([url, f"picture {n}", "https://example.org/licence"] for n, url in enumerate(urls))
    return path


def samples(out: Path) -> dict[str, dict]:
    tars = [str(path) for path in sorted(out.glob("train-*.tar"))]
    found = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return {json.loads(sample["json"])["source"]: sample for sample in found}


def skips(out: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}


GOOD = ["0.png", "1.png?size=large", "flaky/2.png", "busy/3.png", "redirect/4.jpg", "cutonce/5.png", "a b/ü 6.png"]
BAD = {
    "404/1.png": "gone: HTTP 404",
    "410/1.png": "gone: HTTP 410",
    "403/1.png": "refused: HTTP 403",
    "noai/1.png": "refused: the server's X-Robots-Tag says noai",
    "page/1.png": "media: 51 bytes that begin with b'<!DOCTYPE html><",
    "big/1.png": "size: more than 200000 bytes",
    "cut/1.png": "cut: ",
    "500/1.png": "server: HTTP 500",
    "slow/1.png": "timeout: ",
}
TRIED = {"cut/1.png", "500/1.png", "slow/1.png"}


def test_every_failure_is_classed_and_a_second_run_fetches_only_what_may_pass(server, tmp_path, capsys):
    out, path = tmp_path / "out", manifest(tmp_path / "m.csv", [server.url(name) for name in [*GOOD, *BAD]])
    shard(str(path), str(out), fetch=QUICK)
    printed = capsys.readouterr().out
    assert "fetched: image_url" in printed
    assert f"16 URLs: {len(GOOD)} fetched" in printed
    assert "the next run tries " in printed
    got = samples(out)
    assert got.keys() == {server.url(name) for name in GOOD}
    assert got[server.url("redirect/4.jpg")]["png"] == server.pictures[4]
    assert got[server.url("a b/ü 6.png")]["txt"] == b"picture 6"
    assert json.loads(got[server.url("0.png")]["json"])["license"] == "https://example.org/licence"
    reasons = skips(out)
    assert reasons.keys() == {server.url(name) for name in BAD}
    for name, reason in BAD.items():
        assert reasons[server.url(name)].startswith(reason)
        assert server.asked[f"/{name}"] == (QUICK.attempts if name in TRIED else 1)

    before = Counter(server.asked)
    with pytest.raises(SystemExit, match="--overwrite"):
        shard(str(path), str(out), fetch=QUICK)
    shard(str(path), str(out), fetch=QUICK, overwrite=True)
    assert samples(out).keys() == got.keys()
    assert (server.asked - before).keys() == {f"/{name}" for name in TRIED}
    assert "after 6 attempts" in skips(out)[server.url("500/1.png")]


def test_what_failed_for_good_is_tried_again_by_class(server, tmp_path):
    names = ["404/1.png", "403/1.png", "page/2.png", "3.png"]
    urls = [server.url(name) for name in names]
    fetch_all(urls, tmp_path, QUICK)
    for retry, again in (("", []), ("gone", [0]), ("gone, media", [0, 2]), ("permanent", [0, 1, 2])):
        before = Counter(server.asked)
        assert fetch_all(urls, tmp_path, QUICK, retry).files.keys() == {urls[3]}
        assert (server.asked - before).keys() == {f"/{names[i]}" for i in again}
    with pytest.raises(SystemExit, match=r"found --retry often; expected permanent, or classes of address"):
        fetch_all(urls, tmp_path, QUICK, "often")


def test_a_busy_host_is_left_alone_as_long_as_it_asks(server, tmp_path):
    urls = [server.url(f"busy/{n}.png") for n in range(6)]
    assert len(fetch_all(urls, tmp_path, QUICK).files) == 6
    times = sorted(moment for _, moment in server.times)
    gap = max(after - before for before, after in pairwise(times))
    assert gap > 0.9
    assert sum(moment - times[0] < 0.9 for moment in times) <= QUICK.per_host


def test_a_host_that_asks_for_a_day_is_closed(server, tmp_path):
    urls = [server.url(f"closed/{n}.png") for n in range(20)]
    start = time.monotonic()
    fetched = fetch_all(urls, tmp_path, QUICK)
    assert time.monotonic() - start < 5
    assert sum(server.asked.values()) <= 2 * QUICK.per_host
    assert len(fetched.reasons) == 20
    assert sum("not asked any more" in reason for reason in fetched.reasons.values()) >= 12


def test_few_at_once_per_host(server, tmp_path):
    server.delay = 0.02
    fetch_all([server.url(f"{n}.png") for n in range(24)], tmp_path, Fetch(threads=16, per_host=3))
    assert server.most == 3


def test_hosts_take_turns():
    turns = Turns(
        [f"http://{host}/{n}" for host in "aab" for n in range(2)] + ["s3://x/0", "http://[bad/"], per_host=1, per_store=9
    )
    first = [turns.next(0.0) for _ in range(6)]
    assert [url and url[:8] for url in first] == ["http://a", "http://b", "s3://x/0", "http://[", None, None]
    turns.finish(first[1])
    turns.again(first[1], 5.0)
    assert turns.next(1.0) == "http://b/1"
    turns.spare("http://a/0", 1.0, PATIENCE + 1)
    assert turns.closed("http://a/1")
    turns.finish("http://b/1")
    assert (turns.next(1.0), turns.pause(1.0)) == (None, 4.0)
    assert turns.next(5.0) == first[1]
    assert turns.waiting == 0


@pytest.mark.parametrize("moment", [1, 9])
def test_killed_and_started_again_fetches_nothing_twice(server, tmp_path, moment):
    server.delay = 0.05
    urls = [server.url(f"{n}.png?{n}") for n in range(30)]
    path, out = manifest(tmp_path / "m.csv", urls), tmp_path / "out"
    code = f"from headwater.tools.shard import shard; shard({str(path)!r}, {str(out)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    ledger = out / "fetch.ledger"
    while not ledger.exists() or ledger.read_bytes().count(b"\n{") < moment:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with ledger.open("ab") as file:
        file.write(b'{"url": "http://torn')  # a power cut may leave half a line
    done = {row["url"] for row in map(json.loads, ledger.read_text().splitlines()[:-1]) if row}
    assert moment <= len(done) < 30
    server.delay, before = 0.0, Counter(server.asked)
    shard(str(path), str(out))
    again = {url for url in urls if (server.asked - before)[url.partition(str(server.server_port))[2]]}
    assert again == set(urls) - done
    assert len(samples(out)) == 30
    assert not (out / "fetched").exists()


def test_contents_that_were_lost_are_fetched_again_and_named_by_their_hash(server, tmp_path):
    url = server.url("1.png")
    file = fetch_all([url, url], tmp_path, QUICK).files[url]
    assert file.name == f"{hashlib.sha256(server.pictures[1]).hexdigest()}.png"
    file.write_bytes(b"")
    (tmp_path / "fetched/x.partial").write_bytes(b"left by a kill")
    assert fetch_all([url], tmp_path, QUICK).files[url].read_bytes() == server.pictures[1]
    assert server.asked["/1.png"] == 2
    assert not list((tmp_path / "fetched").glob("*.partial"))


def test_stores_and_files_are_read_by_fsspec(tmp_path):
    import fsspec

    content = pictures(1)[0]
    (tmp_path / "a.png").write_bytes(content)
    with fsspec.open("memory://shelf/b.png", "wb") as file:
        file.write(content)
    path = manifest(tmp_path / "m.csv", [f"file://{tmp_path}/a.png", "memory://shelf/b.png", "memory://shelf/none.png"])
    shard(str(path), str(tmp_path / "out"))
    assert len(samples(tmp_path / "out")) == 2
    assert skips(tmp_path / "out")["memory://shelf/none.png"].startswith("gone")
    with pytest.raises(SystemExit, match="install the fsspec file system for nothing://"):
        fetch_all(["nothing://x/y.png"], tmp_path / "two", QUICK)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://[bad/1.png", "address: "),
        ("http://a b:x/1.png", "address: "),
        ("http://127.0.0.1:9/1.png", "connection: "),
        ("file:///nowhere/1.png", "gone: "),
        ("file:///tmp", "connection: "),
    ],
)
def test_addresses_that_lead_nowhere(tmp_path, monkeypatch, url, reason):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch_all([url], tmp_path, QUICK).reasons[url].startswith(reason)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"per_host=0.*expected counts from 1 up"):
        fetch_all([], tmp_path, Fetch(per_host=0))


def test_which_columns_are_fetched(server, tmp_path):
    rows = [
        {"page": server.url("page/1"), "author": "https://example.org/me", "words": f"w{n}", "img": server.url(f"pic/{n}")}
        for n in range(2)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="columns page, author, img hold URLs; name those to fetch with --url page"):
        shard(str(path), str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="no column 'image'"):
        shard(str(path), str(tmp_path / "out"), url="image")
    shard(str(path), str(tmp_path / "out"), url="img", caption="words")
    assert len(samples(tmp_path / "out")) == 2
    assert not any(path.startswith("/page") for path in server.asked)


def test_a_ledger_has_one_writer_and_keeps_the_last_word(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.note("http://a/ü\n", Entry("server", 1, message="HTTP 500"))
        ledger.note("http://a/ü\n", Entry("", 2, "00ff", "png", 7))
        with pytest.raises(SystemExit, match="in use by another run"):
            Ledger(tmp_path / "l")
    with (tmp_path / "l").open("ab") as file:
        file.write(b"\x00\xff[1]\n{}\n[]\nnull")
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.entries == {"http://a/ü\n": Entry("", 2, "00ff", "png", 7)}
        ledger.note("b", Entry("gone"))
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.entries.keys() == {"http://a/ü\n", "b"}


def test_signatures_lead_to_known_extensions():
    from headwater.tools.decode import KIND

    assert {extension for _, _, extension in BEGINNINGS} - {""} <= KIND.keys()
