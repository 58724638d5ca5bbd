"""Fuzz the walk over tars and the reading of indexes: `python -m tests.fuzz.fuzz_tar --seconds 600`.

Inputs begin as the corpus of broken tars and change by rules that know the format: fields are set, blocks moved, tars joined,
and checksums made right again, so that what lies behind them is reached. An input that makes the walk say something new joins
the corpus. Damaged indexes are opened in a forked child, where a crash of the process is seen. An input that breaks a promise,
or takes more than five seconds, is kept in the folder --out, and the exit code is 1.
"""

import argparse
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "datamodules"))

from broken import CHECKSUM, KIND, MAGIC, NAME, SIZE, cases, entry, pax, record, sound, summed, walk

from headwater.datamodules.index import VERSION, index_path, load_index, save_index, scan
from headwater.datamodules.tar import BLOCK, Damage

LIMIT = 5.0  # seconds of one input
LARGE = 200_000  # bytes of an input
CHILD = 200  # indexes per forked child
SAID = (
    "cut off:|cut off by|damaged|announces|another tar|link|sparse|of the kind|control|leads out|letters|lost|end marker|not a tar"
)
SAID += "|begin|index|a member|compressed|empty|appears twice|tar before|no key|more faults|Git|web page|zip|reads|extension number"
NUMBERS = (0, 1, 7, 8, 511, 512, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63)
BIG = (b"\x80" + bytes(11), b"\x80" + b"\xff" * 11, b"\xff" * 12)
FIELDS: list[tuple[slice, tuple[bytes, ...]]] = [
    (NAME, (b"", b"../a.txt", b"/a.txt", b"a" * 100, b"000001.txt", b"a/", b"\xff.txt", b"a\nb.txt", b"__index__", b"x.tar")),
    (SIZE, (b"0" * 11, b"7" * 12, b"-1", b"", b" 1000", b"00000001000\0", b"00000002001\0", b"9", *BIG)),
    (KIND, tuple(bytes([k]) for k in b"\x000123456789LKxgXSDMVN\xff")),
    (MAGIC, (b"ustar  \0", b"ustar\00000", b"", b"x" * 8)),
    (slice(345, 500), (b"", b"prefix", b"..", b"p" * 155, b"\xfe")),
    (CHECKSUM, (b"0" * 6 + b"\0 ", b"\xff" * 8, b" " * 8, b"777777\0 ")),
]
PIECES = (
    bytes(BLOCK),
    bytes(2 * BLOCK),
    b"\xff" * BLOCK,
    b"ustar  \0" * 64,
    b"01234567" * 64,
    entry("new.txt", b"new"),
    entry("long/" * 40 + "new.txt", b"new"),
    entry("nested.tar", entry("inner.txt", b"x") + bytes(2 * BLOCK)),
    pax(record("path", "../evil.txt")),
    pax(record("size", "99999999999")),
    pax(record("GNU.sparse.major", "1")),
    pax(record("headwater", '{"a": 1}'), b"g"),
    entry("././@LongLink", b"named.txt\0", b"L"),
)


def changed(raw: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """One step away from a tar."""
    out = bytearray(raw)
    blocks = len(out) // BLOCK
    place = rng.randrange(len(out) + 1)
    grid = rng.randrange(blocks + 1) * BLOCK
    width = rng.choice((1, 1, 2, 3, 8, 20)) * BLOCK
    action = rng.randrange(12)
    if action <= 3 and blocks:  # most often a field of a header
        start = rng.choice(headers(out) or [grid])
        field, values = rng.choice(FIELDS)
        width = field.stop - field.start
        out[start + field.start : start + field.stop] = rng.choice(values).ljust(width, b"\0")[:width]
        if action:
            out[start : start + BLOCK] = summed(out[start : start + BLOCK].ljust(BLOCK, b"\0"))
    elif action == 4:
        for _ in range(rng.choice((1, 1, 4, 30))):
            if out:
                out[rng.randrange(len(out))] = rng.randrange(256)
    elif action == 5:
        at = rng.choice((place, grid, grid))
        out[at:at] = rng.choice(PIECES)
    elif action == 6:
        del out[grid : grid + width]
    elif action == 7:
        at = rng.randrange(blocks + 1) * BLOCK
        out[at:at] = out[grid : grid + width]
    elif action == 8:
        out[grid : grid + width] = bytes(min(width, len(out) - grid))
    elif action == 9:
        other = rng.choice(corpus)
        out[rng.choice((place, grid, grid)) :] = other[rng.randrange(len(other) // BLOCK + 1) * BLOCK :]
    elif action == 10:
        del out[rng.choice((place, grid)) :]
    else:
        for start in headers(out):
            out[start : start + BLOCK] = summed(out[start : start + BLOCK])
    return bytes(out[:LARGE])


def headers(raw: bytes | bytearray) -> list[int]:
    """Where blocks with the magic of a header stand."""
    return [k for k in range(0, len(raw) - BLOCK + 1, BLOCK) if raw[k + 257 : k + 262] == b"ustar"]


def changed_index(raw: bytes, rng: random.Random) -> bytes:
    """Some steps away from the bytes of an index."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        place = rng.randrange(max(1, len(out)))
        word = place // 4 * 4
        action = rng.randrange(8)
        if action <= 3:  # a number of the columns or of the tables that describe them
            width = rng.choice((2, 4, 8))
            out[word : word + width] = (rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1)) & (1 << 8 * width) - 1).to_bytes(
                width, "little"
            )
        elif action == 4:
            out[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 5:
            del out[word : word + rng.choice((1, 4, 8, 64))]
        elif action == 6:
            out[word:word] = rng.choice((b"\0", b"\xff" * 4, bytes(8), out[:64]))
        elif numbers := list(re.finditer(rb"\d+|\[|\{|\"\w+\"", bytes(out))):  # the note in JSON
            spot = rng.choice(numbers)
            out[spot.start() : spot.end()] = rng.choice(
                (b"0", b"-1", b"1e9", b"null", b"[]", b"{}", b'"x"', b"[" * 3000, b"9" * 40)
            )
    return bytes(out)


class Hang(Exception):
    """An input took longer than LIMIT."""


def watched(attempt: Callable[[], None]) -> BaseException | None:
    """What an attempt raised, a `Hang` when it took too long."""

    def stop(*signal: object) -> None:
        raise Hang(f"took more than {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        attempt()
    except Exception as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


class Run:
    """What a run of the fuzzer has found so far. folder: where its files are; out: where failing inputs are kept."""

    def __init__(self, seed: int, folder: Path, out: Path) -> None:
        self.rng, self.folder, self.out = random.Random(seed), folder, out
        self.corpus = [case.raw for case in cases() if len(case.raw) <= LARGE]
        self.said: set[tuple[str, str, int]] = set()  # what the walk said, and next, and whether more than once
        self.tars = self.indexes = 0
        self.failures: list[str] = []
        self.good = [self._indexed(raw) for raw in (self.corpus[-1], self.corpus[len(self.corpus) // 2], b"", *self.corpus[-12:-6])]

    def tar(self) -> None:
        """One tar through the walk and the scan."""
        raw = self.rng.choice(self.corpus)
        for _ in range(self.rng.choice((1, 1, 2, 3, 6))):
            raw = changed(raw, self.corpus, self.rng)
        said: list[str] = []
        error = watched(lambda: self._tar(raw, said))
        self.tars += 1
        if error:
            self.failed("tar", raw, error)
        pairs = {(*pair, min(count, 2)) for pair, count in Counter(pairwise(said)).items()}
        if not pairs <= self.said:
            self.said |= pairs
            self.corpus.append(raw)

    def _tar(self, raw: bytes, said: list[str]) -> None:
        found = walk(raw, {})
        path = self.folder / "case.tar"
        path.write_bytes(raw)
        index = scan(path, hashed=self.rng.random() < 0.1)
        sound(index, raw)
        whys = [one.why if isinstance(one, Damage) else "a member" for one in found]
        said += [word for text in ("begin", *whys, "index", *index.faults) for word in re.findall(SAID, text)]

    def index_child(self) -> None:
        """A child that opens damaged indexes; when it dies, the last one did it."""
        seed = self.rng.getrandbits(64)
        child = os.fork()
        if not child:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # a number that lies must not fill the memory
                self._indexes(random.Random(seed))
                code = 0
            except BaseException:
                (self.folder / "said").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        self.indexes += CHILD
        _, status = os.waitpid(child, 0)
        if status:
            said = self.folder / "said"
            error = said.read_text() if said.exists() else f"the process died with the status {status}"
            said.unlink(missing_ok=True)
            self.failed("idx", (self.folder / "last.idx").read_bytes(), RuntimeError(error))

    def _indexes(self, rng: random.Random) -> None:
        for _ in range(CHILD):
            path, raw, good = rng.choice(self.good)
            bad = changed_index(good, rng)
            fresh = self.folder / "last.idx"
            fresh.unlink(missing_ok=True)  # not written in place: an older one may still be mapped
            fresh.write_bytes(bad)
            index_path(path).unlink(missing_ok=True)
            index_path(path).write_bytes(bad)
            signal.alarm(int(LIMIT))  # without a handler it ends the child
            sound(load_index(path), raw)
            signal.alarm(0)

    def _indexed(self, raw: bytes) -> tuple[Path, bytes, bytes]:
        path = self.folder / f"good-{len(list(self.folder.iterdir()))}.tar"
        path.write_bytes(raw)
        index = scan(path, hashed=True)
        hints = {"png.width": index.first[1:].astype("float32"), "ogg.seconds": index.first[1:].astype("float32")}
        card = index.card._replace(hints=tuple(hints), header={"source": "fuzz"})
        return path, raw, save_index(replace(index, card=card, hints=hints)).read_bytes()

    def failed(self, kind: str, raw: bytes, error: BaseException) -> None:
        """Keep an input that broke a promise, once for each place in the code."""
        trace = "".join(traceback.format_exception(error))
        if trace[-300:] not in self.failures:
            self.failures.append(trace[-300:])
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"failure-{len(self.failures)}.{kind}"
            path.write_bytes(raw)
            print(f"{path}:\n{trace}")


def main(seconds: float, seed: int, out: Path) -> int:
    """Run for that long; the exit code."""
    print(f"seed {seed}, index version {VERSION}")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        run = Run(seed, Path(folder), out)
        begin = time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds:
            for _ in range(500):
                run.tar()
            run.index_child()
        print(
            f"{run.tars} tars and {run.indexes} indexes in {spent:.0f} s, {(run.tars + run.indexes) / spent:.0f} per second; "
            f"{len(run.said)} pairs of events, {len(run.failures)} failures"
        )
    return 1 if run.failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    options = parser.parse_args()
    sys.exit(main(options.seconds, options.seed, options.out))
