"""Which URL is fetched next: hosts take turns, each has few at once and is left alone for as long as it asks."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from urllib.parse import urlsplit

PATIENCE = 600.0  # seconds; a host that asks for more is left to the next run


class Turns:
    """A queue of URLs by host. Times are seconds of one steady clock.

    Args:
        urls: to fetch.
        per_host: at once from one web host.
        per_store: at once from one bucket or file system.
    """

    def __init__(self, urls: Iterable[str], per_host: int, per_store: int) -> None:
        self.per_host, self.per_store = per_host, per_store
        self.waiting = 0  # URLs that are to be given out, now or later
        self._urls: dict[str, deque[str]] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()  # hosts that may have something to give, in turn
        self._later: list[tuple[float, str, str]] = []  # (when, host, URL or "" for the whole host)
        self._quiet: dict[str, float] = {}
        self._closed: set[str] = set()
        self._active: Counter[str] = Counter()
        for url in urls:
            self._add(url)

    def next(self, now: float) -> str | None:
        """A URL to fetch now, or None when all hosts are busy or quiet."""
        while self._later and self._later[0][0] <= now:
            _, host, url = heapq.heappop(self._later)
            if url:
                self.waiting -= 1
                self._add(url)
            self._ready[host] = None
        while self._ready:
            host, _ = self._ready.popitem(last=False)
            if not self._urls.get(host) or self._active[host] >= self._limit(host):
                continue  # `finish` makes it ready again
            if self._quiet.get(host, 0) > now:
                heapq.heappush(self._later, (self._quiet[host], host, ""))
                continue
            self._active[host] += 1
            self.waiting -= 1
            self._ready[host] = None
            return self._urls[host].popleft()
        return None

    def finish(self, url: str) -> None:
        """A URL that was given out is no longer being fetched."""
        host = host_of(url)
        self._active[host] -= 1
        self._ready[host] = None

    def again(self, url: str, when: float) -> None:
        """Give the URL out once more, not before `when`."""
        self.waiting += 1
        heapq.heappush(self._later, (when, host_of(url), url))

    def spare(self, url: str, now: float, seconds: float) -> list[str]:
        """Leave the host of `url` alone for so long. Beyond PATIENCE it is closed; all its URLs are given up and returned."""
        host = host_of(url)
        self._quiet[host] = max(self._quiet.get(host, 0), now + seconds)
        if seconds <= PATIENCE:
            return []
        self._closed.add(host)
        dropped = [*self._urls.pop(host, ()), *(one for _, place, one in self._later if place == host and one)]
        self._later = [entry for entry in self._later if entry[1] != host]
        heapq.heapify(self._later)
        self.waiting -= len(dropped)
        return dropped

    def closed(self, url: str) -> bool:
        """Whether nothing more is asked of the host of `url` in this run."""
        return host_of(url) in self._closed

    def pause(self, now: float) -> float | None:
        """Seconds until a URL or host may be tried again; None when that waits for running fetches only."""
        return max(0.0, self._later[0][0] - now) if self._later else None

    def _add(self, url: str) -> None:
        host = host_of(url)
        self._urls.setdefault(host, deque()).append(url)
        self._ready[host] = None
        self.waiting += 1

    def _limit(self, host: str) -> int:
        return self.per_host if host.startswith("http") else self.per_store


def host_of(url: str) -> str:
    """Scheme and host (or bucket) of a URL; only the scheme where the rest is malformed."""
    try:
        return urlsplit(url)._replace(path="", query="", fragment="").geturl().lower()
    except ValueError:
        return url.partition(":")[0].lower()
