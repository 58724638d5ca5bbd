"""Fetch the URLs of a manifest: resumable, polite, every failure named. Contents lie under their hash in out/fetched/."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from headwater.tools.decode import KIND, extension_of, in_bytes
from headwater.tools.ingest.download import Fault, content, path_of, store
from headwater.tools.ingest.ledger import PERMANENT, TRANSIENT, Entry, Ledger
from headwater.tools.ingest.signatures import HEAD, extension_by_content
from headwater.tools.ingest.turns import Turns


@dataclass(frozen=True)
class Fetch:
    """How URLs are fetched.

    Args:
        threads: at once, over all hosts.
        per_host: at once from one web host; buckets and file systems get as many as there are threads.
        timeout: seconds without a byte; a fetch that stays below 10 KB/s for longer is given up too.
        attempts: per URL and run, when the fault may pass.
        pause: seconds before the second attempt; doubles with each further one. A server's Retry-After goes first.
        largest: bytes of one file.
        keep: leave out/fetched/ where it is when the shards are written.
    """

    threads: int = 32
    per_host: int = 4
    timeout: float = 30.0
    attempts: int = 4
    pause: float = 1.0
    largest: int = 1 << 30
    keep: bool = False


FETCH = Fetch()


class Fetched(NamedTuple):
    """files: URL -> local file; reasons: URL -> why there is none; report: sentences."""

    files: dict[str, Path]
    reasons: dict[str, str]
    report: list[str]


def fetch_all(
    urls: Iterable[str], out: Path, how: Fetch, retry: str = "", wanted: Collection[str] = KIND, progress: bool = False
) -> Fetched:
    """Fetch each URL once and note in out/fetch.ledger what became of it; what is done there is not fetched again.

    retry: which faults to try again besides those that may pass: "permanent", or classes such as "gone,media".
    wanted: extensions that count as content; anything else is a fault of class "media".
    """
    if min(how.threads, how.per_host, how.attempts, how.largest) < 1 or how.timeout <= 0:
        raise SystemExit(f"found {how}; expected counts from 1 up and a timeout above 0")
    urls = list(dict.fromkeys(urls))
    again = _classes(retry)
    for scheme, url in {url.partition("://")[0]: url for url in urls}.items():
        store(scheme, url)
    folder = out / "fetched"
    with Ledger(out / "fetch.ledger") as ledger, Progress(disable=not progress, transient=True) as bar:
        folder.mkdir(exist_ok=True)
        for partial in folder.glob("*.partial"):
            partial.unlink()
        todo = [url for url in urls if not _settled(ledger.entries.get(url), folder, again)]
        task = bar.add_task("fetching", total=len(urls), completed=len(urls) - len(todo))
        for url, entry, last in _attempts(todo, folder, how, wanted):
            before = ledger.entries.get(url, Entry()).attempts
            ledger.note(url, entry._replace(attempts=before + entry.attempts))
            bar.advance(task, int(last))
        entries = {url: ledger.entries[url] for url in urls}
    files = {url: _place(folder, entry) for url, entry in entries.items() if not entry.fault}
    reasons = {u: f"{e.fault}: {e.message}, after {e.attempts} attempts" for u, e in entries.items() if e.fault}
    return Fetched(files, reasons, _report(entries, len(todo)))


def clear(out: Path) -> None:
    """Remove out/fetched/, now that its contents are in shards, unless some URL may still be fetched by a further run."""
    with Ledger(out / "fetch.ledger") as ledger:
        if not any(entry.fault in TRANSIENT for entry in ledger.entries.values()):
            shutil.rmtree(out / "fetched", ignore_errors=True)


def _classes(retry: str) -> set[str]:
    named = {name.strip() for name in retry.split(",") if name.strip()}
    if odd := named - {"permanent", *PERMANENT, *TRANSIENT}:
        raise SystemExit(f"found --retry {min(odd)}; expected permanent, or classes of {', '.join(PERMANENT)}")
    return {*named, *TRANSIENT, *(PERMANENT if "permanent" in named else ())}


def _settled(entry: Entry | None, folder: Path, again: set[str]) -> bool:
    """Whether there is nothing to do: given up for good, or done and the file is still whole."""
    if entry is None:
        return False
    if entry.fault:
        return entry.fault not in again
    path = _place(folder, entry)
    return path.is_file() and path.stat().st_size == entry.size


def _place(folder: Path, entry: Entry) -> Path:
    return folder / entry.digest[:2] / f"{entry.digest}.{entry.extension}"


def _attempts(todo: list[str], folder: Path, how: Fetch, wanted: Collection[str]) -> Iterator[tuple[str, Entry, bool]]:
    """Every attempt as (URL, outcome, whether it was the URL's last in this run)."""
    turns = Turns(todo, how.per_host, how.threads)
    tries: Counter[str] = Counter()
    running: dict[Future[Entry], str] = {}
    with ThreadPoolExecutor(how.threads) as pool:
        while running or turns.waiting:
            while len(running) < how.threads and (url := turns.next(time.monotonic())):
                running[pool.submit(_download, url, folder, how, wanted)] = url
            if not running:
                time.sleep(turns.pause(time.monotonic()) or 0)
                continue
            full = len(running) == how.threads
            for future in wait(running, None if full else turns.pause(time.monotonic()), FIRST_COMPLETED).done:
                url = running.pop(future)
                tries[url] += 1
                turns.finish(url)
                fault = future.exception()
                if fault is None:
                    yield url, future.result(), True
                    continue
                if not isinstance(fault, Fault):
                    raise fault
                now = time.monotonic()
                for dropped in turns.spare(url, now, fault.wait) if fault.wait else ():
                    yield dropped, Entry(fault.name, 0, message=f"not asked any more: {fault}"), True
                last = fault.name not in TRANSIENT or tries[url] >= how.attempts or turns.closed(url)
                yield url, Entry(fault.name, 1, message=str(fault)), last
                if not last:
                    turns.again(url, now + how.pause * 2 ** (tries[url] - 1))


def _download(url: str, folder: Path, how: Fetch, wanted: Collection[str]) -> Entry:
    """One attempt; the file is on disk under its name before this returns."""
    digest, size = hashlib.sha256(), 0
    partial = folder / f"{uuid.uuid4().hex}.partial"
    try:
        with partial.open("w+b") as file:
            for part in content(url, how.timeout):
                size += len(part)
                if size > how.largest:
                    raise Fault("size", f"more than {how.largest} bytes; raise --fetch.largest to take it")
                digest.update(part)
                file.write(part)
            file.seek(0)
            head = file.read(HEAD)
            file.flush()
            os.fsync(file.fileno())
        claimed = extension_of(path_of(url))
        extension = extension_by_content(head, claimed)
        if not extension and KIND.get(claimed) in ("text", "json", None):  # these begin with anything
            extension = claimed
        if extension not in wanted or not size:
            raise Fault("media", f"{size} bytes that begin with {head[:16]!r}; expected a known picture, sound, video or array")
        entry = Entry("", 1, digest.hexdigest(), extension, size)
        place = _place(folder, entry)
        place.parent.mkdir(exist_ok=True)
        os.replace(partial, place)
        return entry
    finally:
        partial.unlink(missing_ok=True)


def _report(entries: dict[str, Entry], tried: int) -> list[str]:
    done = [entry.size for entry in entries.values() if not entry.fault]
    faults = Counter(entry.fault for entry in entries.values() if entry.fault)
    lines = [f"{len(entries)} URLs: {len(done)} fetched ({in_bytes(sum(done))}), {len(entries) - tried} settled by earlier runs"]
    if faults:
        lines.append("not fetched: " + ", ".join(f"{name} {count}" for name, count in faults.most_common()))
        passing, lasting = ([name for name in faults if name in kinds] for kinds in (TRANSIENT, PERMANENT))
        if passing:
            lines.append(f"the next run tries {', '.join(passing)} again; --overwrite lets it replace these shards")
        if lasting:
            lines.append(f"--retry {','.join(lasting)} would try those again too")
    return lines
