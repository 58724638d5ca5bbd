"""One attempt at one URL: its bytes, or a fault of a named class that says whether to try again.

Web addresses are read with the standard library, which shows status, headers and length; all other schemes with fsspec.
"""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from headwater import __version__

AGENT = f"headwater/{__version__}"
WEB = ("http", "https")
CHUNK = 1 << 16
SLOWEST = 10_000  # bytes per second
REFUSALS = ("noai", "noimageai", "noindex", "noimageindex")  # in X-Robots-Tag; the first two are DeviantArt's convention
STATUS = {401: "refused", 403: "refused", 404: "gone", 408: "timeout", 410: "gone", 425: "busy", 429: "busy", 451: "refused"}


class Fault(Exception):
    """Why an attempt failed. name: its class, one of ledger.TRANSIENT or ledger.PERMANENT; wait: seconds the host asks for."""

    def __init__(self, name: str, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.name, self.wait = name, wait


def store(scheme: str, url: str) -> None:
    """Stop when nothing here opens URLs of that scheme."""
    import fsspec

    if scheme.lower() in WEB:
        return
    try:
        fsspec.get_filesystem_class(scheme.lower())
    except (ImportError, ValueError) as error:
        raise SystemExit(f"{url} cannot be opened: {error}; install the fsspec file system for {scheme}://") from error


def path_of(url: str) -> str:
    """The path of a URL, without query and fragment."""
    return urlsplit(url).path


def content(url: str, timeout: float) -> Iterator[bytes]:
    """The bytes behind a URL, piece by piece; raises Fault.

    timeout: seconds without a byte, and seconds after which the mean speed must be above SLOWEST.
    """
    start, size = time.monotonic(), 0
    try:
        for part in _web(url, timeout) if url.partition(":")[0].lower() in WEB else _stored(url):
            size += len(part)
            yield part
            if time.monotonic() - start > timeout + size / SLOWEST:
                raise TimeoutError(f"slower than {SLOWEST / 1000:.0f} KB/s")
    except urllib.error.HTTPError as error:
        name = STATUS.get(error.code, "server" if error.code >= 500 else "request")
        wait = _seconds(error.headers.get("Retry-After")) if error.code in (429, 503) else None
        error.close()
        raise Fault(name, f"HTTP {error.code} {error.reason}", wait) from error
    except Exception as error:  # stores raise nearly anything
        cause = getattr(error, "reason", None)
        raise _fault(cause if isinstance(cause, Exception) else error) from error


def _fault(error: Exception) -> Fault:
    if isinstance(error, Fault):
        return error
    names = {
        ssl.SSLCertVerificationError: "certificate",
        FileNotFoundError: "gone",
        PermissionError: "refused",
        TimeoutError: "timeout",
        http.client.InvalidURL: "address",
        http.client.IncompleteRead: "cut",
        UnicodeError: "address",
        ValueError: "address",
    }
    name = next((name for kind, name in names.items() if isinstance(error, kind)), "connection")
    return Fault(name, " ".join(str(error).split()) or type(error).__name__)


def _web(url: str, timeout: float) -> Iterator[bytes]:
    request = urllib.request.Request(_ascii(url), headers={"User-Agent": AGENT})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if refusal := next((r for r in REFUSALS if r in answer.headers.get("X-Robots-Tag", "").lower()), None):
            raise Fault("refused", f"the server's X-Robots-Tag says {refusal}")
        size, length = 0, answer.headers.get("Content-Length", "")
        while part := answer.read1(CHUNK):  # returns what is there, so that a slow drip cannot hold it for ever
            size += len(part)
            yield part
        if length.isdecimal() and size < int(length):
            raise Fault("cut", f"{size} of {length} bytes")


def _stored(url: str) -> Iterator[bytes]:
    import fsspec

    with fsspec.open(url, "rb") as file:
        while part := file.read(CHUNK):
            yield part


def _ascii(url: str) -> str:
    """The URL as it goes over the wire: names with other letters, blanks and the like are escaped."""
    parts = urlsplit(url)
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, "/%:@!$&'()*+,;=~?") for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(netloc=netloc, path=path, query=query))


def _seconds(retry_after: Any) -> float | None:
    """Retry-After in seconds: a number or an HTTP date (RFC 9110, 10.2.3)."""
    text = str(retry_after or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
