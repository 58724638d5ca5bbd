"""Where the bytes of shards come from: local files, object stores by ranges, or a bounded cache of whole shards."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from headwater.embedded import place

TRIES = 5  # of a remote read; the pauses between them add up to 15 seconds
T = TypeVar("T")


def is_remote(path: str) -> bool:
    """True for a URL that is not a local file: "s3://...", "https://...", "pipe:..."."""
    return path.startswith("pipe:") or ("://" in path and not path.startswith("file://"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url} needs a library of its store: {error}") from error


class File:
    """A file that is read by ranges. One that is local is read with pread, so threads and positions do not matter."""

    def __init__(self, path: str) -> None:
        self.path = path
        if is_remote(path):
            self._store, self._name = filesystem(path)
            self.size = int(insist(lambda: self._store.info(self._name))["size"] or 0)
            self._descriptor = -1
        else:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset` on; fewer at the end."""
        if self._descriptor >= 0:
            content = os.pread(self._descriptor, size, offset)
            while len(content) < size and (more := os.pread(self._descriptor, size - len(content), offset + len(content))):
                content += more  # one call gives at most 2 GiB
            return content
        end = min(offset + size, self.size)
        return insist(lambda: self._store.cat_file(self._name, start=offset, end=end)) if offset < end else b""

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def insist(attempt: Callable[[], T]) -> T:
    """Try again with growing pauses when a store or network fails; a missing file or a lack of rights is told at once."""
    for number in range(TRIES):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError):
            raise
        except OSError:  # fsspec's stores raise its subclasses for time-outs and resets
            if number == TRIES - 1:
                raise
            time.sleep(2**number)
    raise AssertionError("unreachable")


class Cache:
    """A folder that holds whole remote shards, the least recently used ones leaving when it is full.

    Shared by all ranks and workers of a machine: a shard is fetched once, under a lock that dies with its holder, and appears
    under its name only when it is whole. The name is a hash of the URL, its size and its version, so two shards with one
    base name never meet and a shard that was replaced is fetched anew.

    Args:
        folder: made when missing.
        size: bytes that may be kept.
    """

    def __init__(self, folder: str, size: int = 100 << 30) -> None:
        self.folder, self.size = Path(folder), size
        self._threads: dict[str, threading.Thread] = {}

    def path(self, url: str) -> str:
        """The local copy of `url`, fetched when it is not there."""
        store, name = filesystem(url)
        facts = insist(lambda: store.info(name))
        version = next((str(facts[k]) for k in ("ETag", "etag", "LastModified", "mtime", "created") if facts.get(k)), "")
        key = hashlib.sha256(f"{url}\n{facts['size']}\n{version}".encode()).hexdigest()[:32]
        target = self.folder / f"{key}.tar"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            with locked(self.folder / f"{key}.lock"):
                if not target.exists():  # another process may have fetched it meanwhile
                    self._fetch(store, name, target, int(facts["size"] or 0))
        os.utime(target)  # the time of the last use decides who leaves
        return str(target)

    def prefetch(self, urls: Sequence[str]) -> None:
        """Begin to fetch shards that are needed soon, one after the other, without waiting."""
        for url in urls:
            if url not in self._threads:
                before = list(self._threads.values())[-1:]
                self._threads[url] = threading.Thread(target=self._ahead, args=(url, before), daemon=True)
                self._threads[url].start()
        self._threads = {url: thread for url, thread in self._threads.items() if thread.is_alive() or url in urls}

    def _ahead(self, url: str, before: list[threading.Thread]) -> None:
        for thread in before:
            thread.join()
        try:
            self.path(url)
        except OSError:
            return  # whoever needs the shard meets the error again and reports it

    def _fetch(self, store: Any, name: str, target: Path, size: int) -> None:
        self._make_room(size)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as partial:
            pass
        try:
            insist(lambda: store.get_file(name, partial.name))
            if size and os.path.getsize(partial.name) != size:
                raise OSError(f"fetched {os.path.getsize(partial.name)} of {size} bytes of {name}")
            os.replace(partial.name, target)
        finally:
            Path(partial.name).unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        kept = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.tar")), key=lambda one: one[0])
        total = sum(size for _, size, _ in kept)
        while kept and total + wanted > self.size:
            _, size, path = kept.pop(0)
            path.unlink(missing_ok=True)  # whoever has it open goes on reading
            total -= size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": {}}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine; the system releases it when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def expand(pattern: str) -> list[str]:
    """The tars that a pattern means, sorted.

    A folder means all tars in it; globs and brace ranges {000..012} are expanded, on object stores too; "embedded:NAME" is a
    file or glob among the shards that ship inside the package; "pipe:COMMAND" is a stream and stays as it is.
    """
    if pattern.startswith("pipe:"):
        return [p for p in braces(pattern)]
    found = [path for one in braces(place(pattern)) for path in (_remote(one) if is_remote(one) else _local(one))]
    missing = [path for path in found if not is_remote(path) and not os.path.isfile(path)]
    if missing or not found:
        where = missing[0] if missing else pattern
        raise FileNotFoundError(
            f"found no shard at {where}; expected a tar, a folder of tars or a glob that matches some. "
            "Make shards with `headwater shard DIR out/`"
        )
    return found


def braces(pattern: str) -> list[str]:
    """Ranges {000..012} written out."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [p for n in numbers for p in braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _local(one: str) -> list[str]:
    one = os.path.expanduser(one.removeprefix("file://"))
    if os.path.isdir(one):
        return sorted(glob.glob(os.path.join(glob.escape(one), "*.tar")))
    return [path for path in sorted(glob.glob(one)) if not path.endswith((".idx", ".partial"))] or [one]


def _remote(one: str) -> list[str]:
    if one.endswith(".tar") and "*" not in one:
        return [one]  # whether it is there shows when it is opened: some stores cannot list
    store, name = filesystem(one)
    return sorted(store.unstrip_protocol(p) for p in store.glob(name if "*" in name else f"{name.rstrip('/')}/*.tar"))
