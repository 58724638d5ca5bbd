"""What became of every URL: an append-only file that survives being killed at any moment.

One line of JSON per attempt, the last line of a URL counts. Lines rather than a database: they can be read, searched and
joined by any tool, appending needs no journal of its own, and unlike SQLite's locks they are safe on network file systems.
A line is with the system as soon as it is noted, so killing the process loses none. The file is synced once a second, so a power
cut loses little, and what it loses is fetched again. A line that was torn is passed over.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

TRANSIENT = ("busy", "connection", "cut", "server", "timeout")
PERMANENT = ("address", "certificate", "gone", "media", "refused", "request", "size")


class Entry(NamedTuple):
    """A URL's state. fault: "" = done, else its class; digest: SHA-256 of the content; attempts: over all runs."""

    fault: str = ""
    attempts: int = 0
    digest: str = ""
    extension: str = ""
    size: int = 0
    message: str = ""


class Ledger:
    """The states by URL in `entries`; `note` appends one. A context manager; one process at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SystemExit(f"{path} is in use by another run; wait for it, or give another folder") from None
        self.entries: dict[str, Entry] = {}
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            try:
                row = json.loads(line)
                url = row.pop("url")
                self.entries[url] = Entry(**row)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        if not line.endswith(b"\n"):
            self._file.write(b"\n")
        self._synced = time.monotonic()

    def note(self, url: str, entry: Entry) -> None:
        """Append the state of a URL."""
        self.entries[url] = entry
        self._file.write(json.dumps({"url": url, **entry._asdict()}).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > 1:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
