"""A corpus of broken tars, the same bytes every time, made from real samples of the embedded shards.

Each case says which samples its damage does not touch. They must be read back byte for byte, and nothing may be found beside
them but what the case names.
"""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from headwater.datamodules import tar
from headwater.datamodules.files import File
from headwater.datamodules.index import ShardIndex, load_index
from headwater.datamodules.tar import BLOCK, LONGEST, Damage, Member, global_header, header
from headwater.embedded import place

END = bytes(2 * BLOCK)
EVER = 1 << 40  # beyond the end of every tar
Samples = dict[str, dict[str, bytes]]


class Broken(NamedTuple):
    """whole: samples that the damage does not touch. touched: keys that may be found beside them.

    fault: a pattern that a fault must match, "" = there must be none, None = nobody can tell without the hashes.
    """

    name: str
    raw: bytes
    whole: Samples
    touched: frozenset[str]
    fault: str | None


class Placed(NamedTuple):
    """A member: its first header begins at `start`, its content lies from `content` to `end`."""

    key: str
    extension: str
    start: int
    content: int
    end: int


class Tar:
    """A tar under construction that knows where its members lie."""

    def __init__(self, samples: Samples | None = None, form: int = tarfile.GNU_FORMAT) -> None:
        self.raw, self.form = bytearray(), form
        self.members: list[Placed] = []
        self.samples: Samples = {}
        for key, members in (samples or {}).items():
            for extension, content in members.items():
                self.member(key, extension, content)

    def member(self, key: str, extension: str, content: bytes) -> None:
        start = len(self.raw)
        self.raw += entry(f"{key}.{extension}", content, form=self.form)
        end = len(self.raw) - (-len(content) % BLOCK)
        self.members.append(Placed(key, extension, start, end - len(content), end))
        self.samples.setdefault(key, {})[extension] = content

    def at(self, sample: int, extension: str) -> Placed:
        """The member of the sample of that number."""
        key = list(self.samples)[sample]
        return next(m for m in self.members if (m.key, m.extension) == (key, extension))

    def case(self, name: str, raw: bytes, fault: str | None, damage: tuple[int, int] = (0, 0), extra: Iterable[str] = ()) -> Broken:
        """`raw` is what became of this tar. damage: first and last byte + 1, in this tar, that are not what they were."""
        first, last = damage
        lost = {m.key for m in self.members if m.start < last and m.end > first}
        whole = {key: members for key, members in self.samples.items() if key not in lost}
        return Broken(name, bytes(raw), whole, frozenset(lost | set(extra)), fault)

    def changed(self, name: str, place: int, new: bytes, fault: str | None, extra: Iterable[str] = ()) -> Broken:
        """Other bytes from `place` on."""
        raw = bytes(self.raw) + END
        return self.case(name, raw[:place] + new + raw[place + len(new) :], fault, (place, place + len(new)), extra)

    def inserted(self, name: str, place: int, new: bytes, fault: str | None, extra: Iterable[str] = ()) -> Broken:
        """More bytes before `place`; when they are no whole blocks, all that follows is off the grid."""
        raw = bytes(self.raw) + END
        damage = (place, EVER if len(new) % BLOCK else place)
        return self.case(name, raw[:place] + new + raw[place:], fault, damage, extra)

    def removed(self, name: str, first: int, last: int, fault: str | None) -> Broken:
        """The bytes from `first` to before `last` are missing."""
        raw = bytes(self.raw) + END
        return self.case(name, raw[:first] + raw[last:], fault, (first, EVER if (last - first) % BLOCK else last))

    def relabelled(
        self, name: str, member: Placed, field: slice, new: bytes, fault: str | None, extra: Iterable[str] = ()
    ) -> Broken:
        """A header field that lies under a right checksum."""
        block = bytearray(self.raw[member.content - BLOCK : member.content])
        block[field] = new.ljust(field.stop - field.start, b"\0")
        return self.changed(name, member.content - BLOCK, summed(block), fault, extra)


NAME, SIZE, CHECKSUM, KIND, MAGIC = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157), slice(257, 265)


def entry(name: str, content: bytes = b"", kind: bytes = b"0", size: int | None = None, form: Any = tarfile.GNU_FORMAT) -> bytes:
    """A header with its content and padding. size: what the header says, if that is not the truth."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content) if size is None else size
    return member.tobuf(form) + content + bytes(-len(content) % BLOCK)


def summed(block: bytes | bytearray) -> bytes:
    """A header with the checksum made right."""
    out = bytearray(block[:BLOCK])
    out[CHECKSUM] = b" " * 8
    out[CHECKSUM] = b"%06o\0 " % sum(out)
    return bytes(out)


def pax(records: bytes, kind: bytes = b"x", size: int | None = None) -> bytes:
    """A pax header with these bytes as its records."""
    return entry("././@PaxHeader", records, kind, size)


def record(key: str, value: str) -> bytes:
    """One right pax record."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def real(count: int = 6, source: str = "things-seen", first: int = 0) -> Samples:
    """Samples of an embedded shard under keys of our own."""
    index = load_index(place(f"embedded:{source}-000.tar"))
    with File(index.path) as file:
        found = [index.read(file, row) for row in range(first, first + count)]
    return {f"{first + n:06d}": {e: content for e, content in one.items() if e != "json"} for n, one in enumerate(found)}


def truncations(t: Tar) -> Iterator[Broken]:
    raw = bytes(t.raw) + END
    yield Broken("cut: nothing left", b"", {}, frozenset(), r"is empty \(0 bytes\)")
    for number, extension in ((0, "png"), (2, "txt"), (3, "ogg"), (5, "ogg")):
        m = t.at(number, extension)
        places = {"in the header": m.start + 200, "after the header": m.content, "in the content": (m.content + m.end) // 2}
        places |= {"one byte early": m.end - 1, "in the padding": m.end + 1, "after the member": m.end + -m.end % BLOCK}
        for where, cut in places.items():
            fault = "is not a tar" if cut < BLOCK else r"damaged from byte|cut off: \d+ of \d+ bytes|end marker"
            yield t.case(f"cut: {number}.{extension} {where}", raw[:cut], fault, (cut, EVER))
    whole = len(t.raw)
    for more, fault in ((0, "end marker"), (100, ""), (BLOCK, ""), (BLOCK + 100, "")):
        yield t.case(f"cut: {more} bytes into the end marker", raw[: whole + more], fault, (whole, EVER))


def flips(t: Tar) -> Iterator[Broken]:
    for number, extension in ((0, "png"), (2, "txt"), (5, "ogg")):
        m = t.at(number, extension)
        for field, offset in {
            "name": 3,
            "mode": 102,
            "size": 130,
            "size high": 125,
            "checksum": 150,
            "type": 156,
            "magic": 259,
        }.items():
            for bit in (1, 128):
                old = t.raw[m.start + offset]
                yield t.changed(
                    f"flip: bit {bit} of the {field} of {number}.{extension}",
                    m.start + offset,
                    bytes([old ^ bit]),
                    "damaged from byte",
                )


def lies(t: Tar) -> Iterator[Broken]:
    """Headers whose checksum is right and whose facts are wrong."""
    m, after = t.at(2, "png"), t.at(2, "txt")
    size = m.end - m.content
    for name, told, fault in (
        ("0", 0, "damaged from byte"),
        ("a block less", size - BLOCK, "damaged from byte"),
        ("a block more", size + BLOCK, "cut off by another header"),
        ("three blocks more", size + 3 * BLOCK, "damaged|cut off by another header"),
        ("more than the file", len(t.raw) * 2, r"is cut off: \d+ of \d+ bytes"),
        ("5 GiB", 5 << 30, "is cut off"),
    ):
        yield t.relabelled(f"lie: size {name}", m, SIZE, b"%011o\0" % told, fault)
    for name, field, fault in (
        ("8 EiB in base 256", b"\x80" + bytes(3) + (1 << 63).to_bytes(8, "big"), "is cut off: .* of 9223372036854775808"),
        ("all bits of base 256", b"\x80" + b"\xff" * 11, "is cut off"),
        ("negative in base 256", b"\xff" * 12, "damaged"),
        ("not octal", b"00000000999\0", "damaged"),
        ("with a sign", b"-0000001000\0", "damaged"),
        ("with an underscore", b"0000_001000\0", "damaged"),
        ("blank", b" " * 12, "damaged"),
        ("all sevens", b"7" * 12, "is cut off"),
    ):
        yield t.relabelled(f"lie: size {name}", m, SIZE, field, fault)
    last = t.at(5, "ogg")
    yield t.relabelled("lie: size of the last member", last, SIZE, b"%011o\0" % (1 << 33), "is cut off")
    yield t.relabelled("lie: name of another sample", after, NAME, b"000000.txt", "appears twice")
    yield t.relabelled("lie: no name", after, NAME, b"", "no key and extension")
    yield t.relabelled("lie: no magic", after, MAGIC, b"", "")
    yield t.relabelled("lie: foreign magic", after, MAGIC, b"rats!\0\0\0", "")
    for kind in b"123456SDMVNZ\xff":
        fault = {b"5": "damaged"}.get(bytes([kind]), "left out|damaged")
        yield t.relabelled(f"lie: a file of the kind {bytes([kind])!r}", after, KIND, bytes([kind]), fault)
    yield t.relabelled(
        "lie: a file as long name", after, KIND, b"L", "no key and extension|left out|control", ["person bouncing ball"]
    )
    yield t.relabelled("lie: a file as pax record", after, KIND, b"x", "lost the record")
    yield t.relabelled("lie: a file as global record", after, KIND, b"g", "record at byte .* is damaged")
    yield t.relabelled("lie: a file as long link", after, KIND, b"K", "")


def zeroes(t: Tar) -> Iterator[Broken]:
    for number, extension in ((0, "png"), (2, "txt"), (3, "png"), (5, "ogg")):
        m = t.at(number, extension)
        yield t.changed(f"zeros: header of {number}.{extension}", m.start, bytes(BLOCK), "damaged from byte")
        yield t.changed(f"zeros: content of {number}.{extension}", m.content, bytes(m.end - m.content), "")
        yield t.changed(
            f"zeros: all of {number}.{extension}",
            m.start,
            bytes(m.end - m.start),
            "damaged|another tar begins" if number < 5 else "",
        )
    for first, length in ((BLOCK, 4096), (3 * BLOCK, 4096), (10 * BLOCK, 8192), (0, 4096), (20 * BLOCK, BLOCK)):
        yield t.changed(f"zeros: {length} bytes from {first}", first, bytes(length), "damaged|another tar begins")


def insertions(t: Tar) -> Iterator[Broken]:
    m = t.at(2, "ogg")
    for length in (1, 37, 511, BLOCK, 700, 3 * BLOCK, 64 * BLOCK):
        garbage = random.Random(length).randbytes(length)
        yield t.inserted(f"insert: {length} bytes between members", m.start, garbage, "damaged")
        yield t.inserted(f"insert: {length} bytes in a content", m.content + 600, garbage, "damaged")
    yield t.inserted("insert: 3 bytes at the head", 0, b"abc", "not a tar")
    yield t.inserted("insert: a block at the head", 0, b"a" * BLOCK, "damaged")
    yield t.inserted("insert: letters that look like magic", m.start, b"ustar  \0" * 192, "damaged")
    yield t.inserted("insert: digits that look like sums", m.start, b"01234567" * 192, "damaged")
    yield t.case("insert: at the end", bytes(t.raw) + END + b"garbage" * 500, "damaged", (0, 0))
    raw = bytes(t.raw) + END
    again = t.at(3, "png").start
    back = raw[: m.start] + b"x" * 37 + raw[m.start : again] + b"y" * 475 + raw[again:]
    yield t.case("insert: off the grid and back", back, "damaged", (m.start, again))


def removals(t: Tar) -> Iterator[Broken]:
    m, following = t.at(2, "png"), t.at(2, "txt")
    yield t.removed("remove: a header", m.start, m.content, "damaged")
    yield t.removed("remove: a block of a content", m.content + BLOCK, m.content + 2 * BLOCK, "cut off by another header")
    yield t.removed("remove: a content", m.content, following.start, None)
    yield t.removed("remove: a member", m.start, following.start, "")
    yield t.removed("remove: end of one, head of the next", m.content + BLOCK, following.content, None)
    yield t.removed("remove: 100 bytes of a header", m.start, m.start + 100, "damaged")
    yield t.removed("remove: 100 bytes of a content", m.content, m.content + 100, "damaged")


def repeats(t: Tar) -> Iterator[Broken]:
    m, raw = t.at(1, "txt"), bytes(t.raw)
    copy = raw[m.start : m.end + -m.end % BLOCK]
    yield t.inserted("repeat: a member behind itself", m.start, copy, "appears twice")
    yield t.case("repeat: a member at the end", raw + copy + END, "appears twice")
    yield t.case("repeat: a member with other content at the end", raw + entry("000001.txt", b"other") + END, "appears twice")
    yield t.case("repeat: a member cut off at the end", raw + entry("000001.txt", b"other", size=9999), "is cut off")
    yield t.case("repeat: a member in capitals", raw + entry("000001.TXT", b"other") + END, "appears twice")
    yield t.case("repeat: everything", raw + raw + END, "appears twice")
    yield t.case("repeat: a thousand times", raw + entry("000001.txt", b"other") * 1100 + END, "and 100 more faults")


OUTSIDE: tuple[str, ...] = (
    "../evil.txt",
    "a/../../evil.txt",
    "/etc/passwd.txt",
    "//host/evil.txt",
    "..\\evil.txt",
    "a\\..\\..\\evil.txt",
)
OUTSIDE += ("C:\\evil.txt", "c:/evil.txt", "\\\\host\\share\\evil.txt", "\\evil.txt", "a/..", "../../../../../../../tmp/evil.png")
CONTROL = ("a\nb.txt", "a\x1b[31mb.txt", "a\rb.txt", "\x07.txt", "a\x7f.txt", "a\x9b31m.txt", "tab\t.txt")
KEYLESS = (".txt", ".hidden", "noextension", "folder/.txt", "trailingdot.", "._000001.png", "a/b/c", " ")


def names(t: Tar) -> Iterator[Broken]:
    raw = bytes(t.raw)
    for kind, hostile, fault in (
        ("outside", OUTSIDE, "folder"),
        ("control", CONTROL, "control characters"),
        ("keyless", KEYLESS, "no key"),
    ):
        for name in hostile:
            yield t.case(f"name: {kind} {name!r}", entry(name, b"evil") + raw + entry(name, b"evil") + END, fault)
    long = "d/" * 3000 + "evil.txt"
    yield t.case("name: of 6000 letters", entry(long, b"evil") + raw + END, "has a name of 6008 letters")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        evil = entry("../" * 50 + "evil.txt", b"evil", form=form)
        yield t.case(f"name: long and outside, format {form}", evil + raw + END, "folder")
    for name in ("../evil.txt", "000099.txt", "000001.txt", "folder/"):
        greedy = summed(entry(name, size=8 * BLOCK - 100))
        yield t.case(f"name: {name} with the size of others", greedy + raw + END, "cut off by another header")
    latin = summed(entry("k?.txt", b"x")[:BLOCK].replace(b"?", b"\xe9", 1)) + b"x".ljust(BLOCK, b"\0")
    yield t.case("name: Latin-1", raw + latin + END, "", extra=["k%e9"])
    yield t.case("name: turned around", raw + entry("\u202egnp.exe.txt", b"x") + END, "", extra=["\u202egnp"])
    yield t.case("name: read by WebDataset", raw + entry("__index__", b"x") + entry("__meta__.json", b"x") + END, "")


def kinds(t: Tar) -> Iterator[Broken]:
    raw = bytes(t.raw)
    link = tarfile.TarInfo("000009.txt")
    for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "000001.txt"), (tarfile.SYMTYPE, "x" * 300)):
        link.type, link.linkname = kind, target
        yield t.case(f"kind: link {kind!r} to {target[:12]}", link.tobuf(tarfile.GNU_FORMAT) + raw + END, "is a link")
    lying = summed(entry("000009.txt", kind=b"2", size=1 << 40))
    yield t.case("kind: link with a size", lying + raw + END, "is a link")
    for kind in (b"3", b"4", b"6"):
        device = entry("000009.txt", kind=kind, size=77)
        yield t.case(f"kind: device or pipe {kind!r}", device + raw + END, "not a file")
    yield t.case(
        "kind: folders", entry("./", kind=b"5") + entry("d/", kind=b"5", size=4096) + entry("e/", kind=b"\0") + raw + END, ""
    )
    yield t.case("kind: folder outside", entry("../d/", kind=b"5") + raw + END, "folder")
    old = bytearray(entry("000009.txt", kind=b"S", size=BLOCK))
    old[482] = 1  # one more block of holes follows
    yield t.case("kind: old sparse", summed(old) + b"\1" * BLOCK + b"\2" * BLOCK + raw + END, "is a sparse file")
    hole = pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "000009.txt"))
    yield t.case("kind: pax sparse", hole + entry("GNUSparseFile.0/000009.txt", b"1\n0\n512\n") + raw + END, "is a sparse file")
    volume = entry("volume", kind=b"V") + entry("dump", b"Ya\0\0", kind=b"D") + entry("part.txt", b"x", kind=b"M")
    yield t.case("kind: of GNU only", volume + raw + END, "not a file")


def records(t: Tar) -> Iterator[Broken]:
    """Damage in long names and pax records."""
    deep = Tar({f"{'folder/' * 16}{key}": members for key, members in t.samples.items()})
    for name, form in (("GNU", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        t2 = Tar(deep.samples, form)
        m = t2.at(2, "txt")
        cut = f"{'folder/' * 14}fo"  # what stands in the header itself
        yield t2.changed(f"record: {name} header flipped", m.start + 110, b"\xff", "damaged|lost the record", [cut])
        yield t2.changed(f"record: {name} header zeroed", m.start, bytes(BLOCK), "damaged")
        yield t2.changed(f"record: {name} header and names zeroed", m.start, bytes(2 * BLOCK), "damaged|lost the record")
        yield t2.changed(f"record: {name} names zeroed", m.start + BLOCK, bytes(BLOCK), "no key|lost the record|left out")
        size = summed(
            bytearray(t2.raw[m.start : m.start + 124]) + b"%011o\0" % (LONGEST + 1) + t2.raw[m.start + 136 : m.start + BLOCK]
        )
        yield t2.changed(f"record: {name} too long", m.start, size, "announces 1048577 bytes")
        cut_at = m.start + BLOCK + 60
        yield t2.case(f"record: {name} cut in its names", bytes(t2.raw[:cut_at]), "announces|damaged|end marker", (cut_at, EVER))
        yield t2.case(f"record: {name} without a member", bytes(t2.raw[: m.content - BLOCK]), "end marker", (m.start, EVER))
        yield t2.inserted(f"record: {name} twice", m.start, bytes(t2.raw[m.start : m.content - BLOCK]), "")
    wrong = {
        "length too long": b"999 path=other.txt\n",
        "length 0": b"0 path=other.txt\n",
        "length of 7 digits": b"9999999 path=other.txt\n",
        "length without end": b"9" * 5000,
        "without equals": b"18 path other.txt\n",
        "without newline": b"18 path=other.txt.",
        "empty": b"\n",
    }
    raw = bytes(t.raw)
    for name, content in wrong.items():
        evil = pax(content) + entry("000009.txt", b"evil")
        yield t.case(f"record: pax {name}", evil + raw + END, "lost the record")
    for name, value in {
        "huge": "9" * 30,
        "of 5000 digits": "9" * 5000,
        "negative": "-1",
        "words": "many",
        "in Arabic": "\u0661\u0662",
    }.items():
        fine = pax(record("size", value)) + entry("000009.txt", b"fine")
        yield t.case(f"record: pax size {name}", fine + raw + END, "", extra=["000009"])
    far = pax(record("size", str(1 << 62))) + entry("000009.txt", b"evil")
    yield t.case("record: pax size beyond the file", far + raw + END, "is cut off")
    short = pax(record("size", "0")) + entry("000009.txt", b"evil")
    yield t.case("record: pax size 0", short + raw + END, "damaged", extra=["000009"])
    yield t.case("record: pax name outside", pax(record("path", "../evil.txt")) + entry("a.txt", b"evil") + raw + END, "folder")
    yield t.case("record: pax name empty", pax(record("path", "")) + entry("000009.txt", b"x") + raw + END, "", extra=["000009"])
    bad = pax(b"19 path=\xff\xfe\xfdabc.txt\n") + entry("a.txt", b"x")
    yield t.case("record: pax name not UTF-8", bad + raw + END, "", extra=["%ff%fe%fdabc"])
    facts = {
        "nested": "[" * 100_000,
        "open": '{"a": ',
        "a list": "[1]",
        "deep": '{"a":' * 90 + "1" + "}" * 90,
        "digits": '{"a": %s}' % ("9" * 9999),
    }
    for name, text in facts.items():
        yield t.case(f"record: facts {name}", pax(record("headwater", text), b"g") + raw + END, "record at byte 0 is damaged")
    yield t.case("record: facts twice", global_header({"a": 1}) + global_header({"b": 2}) + raw + END, "")


def bombs(t: Tar) -> Iterator[Broken]:
    raw = bytes(t.raw)
    empty = b"".join(header(f"e{n:06d}.txt", 0) for n in range(3000))
    yield t.case("bomb: empty members", raw + empty + END, "", extra=[f"e{n:06d}" for n in range(3000)])
    kinds = b"".join(header(f"000001.kind{n}", 0) for n in range(1000))
    yield t.case("bomb: a thousand extensions", raw + kinds + END, "", (t.at(1, "png").start, t.at(1, "ogg").end))
    vast = summed(entry("000009.txt", size=(1 << 63) - 1)[:BLOCK])
    yield t.case("bomb: 8 EiB announced", vast + raw + END, "is cut off")
    yield t.case("bomb: 8 EiB announced 500 times", vast * 500 + raw + END, "is cut off")
    yield t.case(
        "bomb: zeros between empty headers",
        (entry("000009.txt") + bytes(BLOCK)) * 300 + raw + END,
        "appears twice",
        extra=["000009"],
    )
    noise = random.Random(0).randbytes(900 * BLOCK)
    overlap = b"".join(header(f"000009.t{n}", (700 - 2 * n) * BLOCK) + noise[:BLOCK] for n in range(300)) + noise
    yield t.case("bomb: members within members", overlap + raw + END, "cut off by", extra=["000009"])
    names = b"".join(pax(record("path", f"{'n' * 3000}{n}.txt")) for n in range(60))
    yield t.case("bomb: names upon names", names + raw + END, "", (0, t.members[0].end), [f"{'n' * 3000}59"])
    inner = bytes(Tar(real(2, first=50)).raw) + END
    nested = entry("000009.tar", inner)
    yield t.case("bomb: a tar in the tar", nested + raw + END, "", extra=["000009"])
    torn = bytearray(nested)
    torn[140] ^= 1
    yield t.case("bomb: a tar in a damaged member", bytes(torn) + raw + END, "damaged", extra=["000050", "000051"])
    yield t.case("bomb: a tar in a cut member", raw + nested[: len(nested) // 2], "cut off", extra=["000050", "000051"])
    m = t.at(0, "png")
    after = nested + bytes([t.raw[0] ^ 1]) + raw[1:] + END
    yield t.case("bomb: damage behind a tar in the tar", after, "damaged", (m.start, m.end), ["000009"])


def joins(t: Tar) -> Iterator[Broken]:
    raw, more = bytes(t.raw), real(3, first=20)
    other = Tar(more)
    both = Tar({**t.samples, **more})
    joined = raw + END + bytes(other.raw) + END
    yield both.case("join: cat a b", joined, "another tar begins")
    yield both.case(
        "join: cat a b, padded as by GNU tar", raw + bytes(-len(raw) % 10240 + 10240) + bytes(other.raw) + END, "another tar begins"
    )
    yield both.case("join: without end marker", raw + bytes(other.raw) + END, "")
    yield both.case("join: one zero block between", raw + bytes(BLOCK) + bytes(other.raw) + END, "damaged")
    yield both.case("join: a cut behind", joined[:-2000], "damaged|cut off|end marker", (len(both.raw) - 976, EVER))
    m = t.at(5, "ogg")
    for name, cut in (("a content", m.content + BLOCK), ("the header", m.content), ("nothing", m.start)):
        damage = (m.start, m.end) if cut > m.start else (0, 0)
        rest = "" if cut == m.start else "cut off by another header"
        samples = Tar({**t.samples, **more}) if cut > m.start else Tar(without(t.samples, "000005", "ogg") | more)
        yield samples.case(f"join: cut after {name}", raw[:cut] + bytes(other.raw) + END, rest, damage)
    same = Tar({"000000": {"wav": b"another sample of the same name"}, "000777": {"txt": b"new"}})
    together = Tar({**t.samples, "000777": {"txt": b"new"}})
    yield together.case("join: same name, other extension", raw + END + bytes(same.raw) + END, "name of a sample of the tar before")
    yield t.case("join: with itself", raw + END + raw + END, "name of a sample|appears twice")
    yield t.case("join: with a gzip", raw + END + gzip.compress(raw, mtime=0), "damaged")


def without(samples: Samples, key: str, extension: str) -> Samples:
    """The samples less one member."""
    return {k: {e: c for e, c in m.items() if (k, e) != (key, extension)} for k, m in samples.items()}


def others(t: Tar) -> Iterator[Broken]:
    """Files that are no tar."""
    raw = bytes(t.raw) + END
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo("000001.txt"), b"text")
    for name, content, fault in (
        ("gzip", gzip.compress(raw, mtime=0), "is gzip-compressed; .*gunzip"),
        ("gzip of little", gzip.compress(b"x", mtime=0), "is gzip-compressed"),
        ("bzip2", bz2.compress(raw), "is bzip2-compressed"),
        ("xz", lzma.compress(raw), "is xz-compressed"),
        ("zstd", b"\x28\xb5\x2f\xfd" + random.Random(1).randbytes(5000), "is zstd-compressed"),
        ("zip", packed.getvalue(), "is a zip"),
        ("web page", b"<!DOCTYPE html><html>404</html>" * 40, "is a web page"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "pointer of Git LFS"),
        ("random", random.Random(2).randbytes(20_000), "is not a tar"),
        ("text", b"some words, no tar\n" * 200, "is not a tar"),
        ("ones", b"\xff" * 5000, "is not a tar"),
        ("picture", t.samples["000000"]["png"], "is not a tar"),
        ("one byte", b"x", "is not a tar"),
        ("a block less one", raw[: BLOCK - 1], "is not a tar"),
        ("one zero", b"\0", ""),
        ("zeros", bytes(10240), ""),
    ):
        yield Broken(f"other: {name}", content, {}, frozenset(), fault)


def forms(t: Tar) -> Iterator[Broken]:
    """Every format, whole and with the header of one member damaged."""
    for name, form in (("ustar", tarfile.USTAR_FORMAT), ("GNU", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT), ("v7", -1)):
        t2 = Tar(t.samples, form if form >= 0 else tarfile.USTAR_FORMAT)
        for m in t2.members if form < 0 else ():
            t2.raw[m.start : m.content] = summed(t2.raw[m.start : m.start + 156] + b"\0" * (BLOCK - 156))
        m = t2.at(2, "txt")
        yield t2.case(f"form: {name}", bytes(t2.raw) + END, "")
        yield t2.changed(f"form: {name} with a damaged header", m.start + 5, b"\xff", "damaged")
        yield t2.changed(f"form: {name} with zeros", m.start, bytes(BLOCK), "damaged")
    deep = Tar({f"{'folder/' * 16}{key}": members for key, members in t.samples.items()}, tarfile.USTAR_FORMAT)
    yield deep.case("form: ustar with prefixes", bytes(deep.raw) + END, "")


class Trap:
    """A pickle that would leave a file behind, were it ever read."""

    def __reduce__(self) -> Any:
        return open, ("/tmp/headwater-trap", "w")


def contents(t: Tar) -> Iterator[Broken]:
    """Tars that are whole and hold what no decoder should trust."""
    trap, array = pickle.dumps(Trap()), io.BytesIO()
    np.save(array, np.array([Trap()], object), allow_pickle=True)
    for extension in ("pkl", "pickle", "pyd", "pth", "pt", "joblib"):
        t2 = Tar({**t.samples, "000009": {"txt": b"a text", extension: trap}})
        yield t2.case(f"content: pickle as {extension}", bytes(t2.raw) + END, "")
    good = real(2, "episodes-test", 30)
    t2 = Tar({**t.samples, **good, "000099": {"txt": b"a text", "npy": array.getvalue()}, "000098": {"npy": trap}})
    yield t2.case("content: objects as npy", bytes(t2.raw) + END, "")
    bad = {"png": t.samples["000000"]["png"][:300], "txt": b"\xff\xfe\0", "ogg": b"OggS" + bytes(100)}
    t2 = Tar({**t.samples, **{f"00001{n}": {**t.samples["000000"], e: content} for n, (e, content) in enumerate(bad.items())}})
    yield t2.case("content: undecodable", bytes(t2.raw) + END, "")
    t2 = Tar(
        {
            **t.samples,
            **{f"00002{n}": {**t.samples["000000"], e: b""} for n, e in enumerate(bad)},
            "000030": {"txt": b"", "png": b""},
        }
    )
    yield t2.case("content: empty members", bytes(t2.raw) + END, "")
    t2 = Tar()
    for extension in ("png", "ogg", "txt"):
        for key, members in t.samples.items():
            t2.member(key, extension, members[extension])
    yield t2.case("content: interleaved", bytes(t2.raw) + END, "")
    m = t2.at(2, "ogg")
    yield t2.changed("content: interleaved and damaged", m.start, b"\xff", "damaged")
    backwards = Tar({key: dict(reversed(members.items())) for key, members in reversed(t.samples.items())})
    yield backwards.case("content: backwards", bytes(backwards.raw) + END, "")
    lone = Tar({"000001": {"json": json.dumps({"a": 1}).encode()}})
    yield lone.case("content: nothing to train on", bytes(lone.raw) + END, "")


FAMILIES = (
    truncations,
    flips,
    lies,
    zeroes,
    insertions,
    removals,
    repeats,
    names,
    kinds,
    records,
    bombs,
    joins,
    others,
    forms,
    contents,
)


def cases() -> list[Broken]:
    """The whole corpus."""
    t = Tar(real())
    return [case for family in FAMILIES for case in family(t)]


def walk(raw: bytes, facts: dict[str, Any] | None = None) -> list[Member | Damage]:
    """All that a walk finds in any bytes, held to its promises: it raises nothing, stays in the file and reads it a few times."""
    calls = spent = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal calls, spent
        assert 0 <= offset <= len(raw)
        assert 0 <= size <= LONGEST
        calls, spent = calls + 1, spent + min(size, len(raw) - offset)
        return raw[offset : offset + size]

    found = list(tar.members(read, len(raw), facts))
    blocks = len(raw) // BLOCK + 1
    assert calls <= 5 * blocks
    assert spent <= 8 * blocks * BLOCK
    assert len(found) <= 2 * blocks
    for one in found:
        if isinstance(one, Member):
            assert one.offset % BLOCK == 0
            assert 0 < one.offset <= one.offset + one.size <= len(raw)
        else:
            assert one.why.isprintable()
            assert len(one.why) < 1000
    return found


def sound(index: ShardIndex, raw: bytes) -> None:
    """Hold an index of a tar with these bytes to its promises: every number is within bounds, every sample can be read."""
    assert len(index) == index.card.samples == len(index.keys) == len(index.first) - 1
    assert index.first[0] == 0
    assert (np.diff(index.first) >= 0).all()
    assert index.first[-1] == len(index.kind) == len(index.block) == len(index.bytes) == len(index.hash)
    assert (index.kind < len(index.extensions)).all()
    assert all(len(column) == len(index) and column.dtype == np.float32 for column in index.hints.values())
    assert tuple(index.hints) == index.card.hints
    with File(index.path) as file:
        for row in range(len(index)):
            assert isinstance(index.key(row), str)
            extent = index.extent(row).members
            assert all(0 < offset <= offset + size <= len(raw) for _, offset, size in extent)
            if len({extension for extension, _, _ in extent}) == len(extent):  # else it is a lie, and reading may raise OSError
                assert index.read(file, row) == {extension: raw[offset : offset + size] for extension, offset, size in extent}
