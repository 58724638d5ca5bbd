"""The tar format as far as shards need it: walk the members of a file that may be damaged or hostile, and write headers.

Formats read: v7, ustar, GNU (long names, base-256 sizes) and pax (path and size, global headers), after POSIX.1-2001 and
the GNU tar manual. Nothing is ever extracted. After damage the walk goes on at the next block of 512 bytes that is a header
with the right checksum, so damage costs the members that it touches and not their neighbours.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from zlib import adler32

import numpy as np

BLOCK = 512
LARGEST = (1 << 32) - 1  # bytes of a member; the index keeps sizes in 32 bits, and no training sample is larger
LONGEST = 1 << 20  # bytes of a long name or of pax records
NAME = 4096  # letters of a name, the longest path of Linux
NESTED = 20  # levels of the facts of a source
CHUNK = 1 << 20  # bytes that are searched at once for the next header
EMPTY = b"123456"  # type flags without content, whatever the header says (POSIX): links, devices, folders, pipes
HEADER = "headwater"  # pax keyword under which a source keeps its facts
Read = Callable[[int, int], bytes]  # (offset, size) -> at most size bytes


class Member(NamedTuple):
    """One regular file of a tar. offset: where its content begins, a multiple of 512; size: bytes."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """What a walk could not use, and why.

    name: of the member, "" where there is none. cut: True when its content is not whole. begins: byte where another tar
    begins that was joined to the first one, 0 = none does.
    """

    name: str
    why: str
    cut: bool = False
    begins: int = 0


class Header(NamedTuple):
    """A tar header that was read. size: bytes of content behind it; kind: the type flag."""

    name: str
    size: int
    kind: bytes


def members(read: Read, total: int, facts: dict[str, Any] | None = None) -> Iterator[Member | Damage]:
    """Walk a tar of `total` bytes. `facts` is filled with the header that headwater wrote, if there is one.

    Whatever the file holds, nothing is raised, and no byte is read more than a few times.
    """
    place = 0
    named: dict[str, str] = {}  # what records say of the next member
    lost = b""  # the type flag of a damaged header before the next member
    last: Member | None = None
    held: Member | Damage | None = None  # what will be said of `last`, when what follows it is in order
    while place < total:
        block = read(place, BLOCK)
        found = parse(block)
        if found is None and last and (inner := _swallowed(read, last, block)):
            yield Damage(last.name, f"{shown(last.name)} is cut off by another header at byte {inner}", isinstance(held, Member))
            last, held, place = None, None, inner
            continue
        if held:
            yield held
        last = held = None
        content = place + BLOCK
        if found is None:
            damage, place = _gap(read, place, block, total)
            if damage:
                yield damage
            if place >= total:
                return
            named, lost = {}, block[156:157]
        elif found.kind in b"LKxg" and found.size > (most := min(LONGEST, total - content)):
            yield Damage("", f"the record at byte {place} announces {found.size} bytes; expected at most {most}")
            place, named, lost = _next_header(read, content, total), {}, found.kind
        elif found.kind in b"LKxg":
            if not _note(found.kind, read(content, found.size), named, facts):
                yield Damage("", f"the record at byte {place} is damaged")
                lost = found.kind
            place = content + found.size + -found.size % BLOCK
        else:
            size = _size(found, named) if named else found.size
            last = Member(named.get("path") or found.name, content, size)
            nameless = bool(lost) and "path" not in named and (lost in b"Lx" or 0 not in block[:100])
            held = _judged(last, found.kind, named, nameless, total)
            place = content + size + -size % BLOCK if content + size <= total else _next_header(read, content, total)
            named, lost = {}, b""
    if held:
        yield held
    yield Damage("", f"ends at byte {total} without an end marker; it may have been cut" if total else "is empty (0 bytes)")


def _judged(one: Member, kind: bytes, named: dict[str, str], nameless: bool, total: int) -> Member | Damage | None:
    """The member if it can be used, None for a folder. nameless: True when a record of its name is lost."""
    if one.offset + one.size > total:
        there = f"{total - one.offset} of {one.size} bytes are there"
        return Damage(one.name, f"{shown(one.name)} is cut off: {there}", cut=not nameless)
    why = "has lost the record of its name to damage" if nameless else _refused(kind, one.name, one.size, named)
    if why:
        return Damage(one.name, f"{shown(one.name)} {why}; it is left out")
    return None if kind == b"5" or one.name.endswith("/") else one


def parse(block: bytes) -> Header | None:
    """The header in a block of 512 bytes; None when its checksum or a number is wrong."""
    if len(block) < BLOCK:
        return None
    stated, size = _number(block[148:156]), _number(block[124:136])
    # the low half of Adler-32 is 1 + the sum of the bytes, exact below 65521: 256 bytes of 255 stay below
    found = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    if size is None or stated != found - sum(block[148:156]) + 8 * 32:
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    kind = block[156:157]
    return Header(name, 0 if kind in EMPTY else size, kind)


def header(name: str, size: int) -> bytes:
    """A GNU header, the same bytes for the same name and size: no clock, no user. Names above 100 bytes take more blocks."""
    raw = name.encode()
    if len(raw) > 99 or not name.isascii():
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        return member.tobuf(tarfile.GNU_FORMAT)
    octal = b"%011o\0" % size
    checksum = _TEMPLATE_SUM + sum(raw) + sum(octal)
    return b"%b%b%b%b%06o\0 %b" % (raw, bytes(100 - len(raw)), _BEFORE, octal + _TIME, checksum, _AFTER)


_BEFORE = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_AFTER = b"0" + bytes(100) + b"ustar  \0" + bytes(247)
_TEMPLATE_SUM = sum(_BEFORE) + sum(_TIME) + 8 * 32 + sum(_AFTER)


def global_header(facts: dict[str, Any]) -> bytes:
    """Facts of a whole source as a pax global header, which every tar reader skips."""
    return tarfile.TarInfo.create_pax_global_header({HEADER: json.dumps(facts, sort_keys=True)})


def unsafe(name: str) -> str:
    """Why no member may bear this name, or ""."""
    if len(name) > NAME:
        return f"has a name of {len(name)} letters, more than {NAME}"
    if not name.isprintable() and _CONTROL.search(name):
        return "has control characters in its name"
    outside = name[:1] in ("/", "\\") or name[1:3] in (":/", ":\\") or (".." in name and ".." in re.split(r"[/\\]", name))
    return "leads out of its folder" if outside else ""


_CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f]")


def shown(name: str) -> str:
    """A name as it may be printed: not endless, and with nothing that speaks to the terminal."""
    short = name if len(name) <= 200 else f"{name[:200]}..."
    return short if short.isprintable() else repr(short)[1:-1]


def _refused(kind: bytes, name: str, size: int, named: dict[str, str]) -> str:
    """Why a member is not used, or ""."""
    if kind == b"S" or (named and any(key.startswith("GNU.sparse") for key in named)):
        return "is a sparse file"
    if kind not in b"0\x0075":
        return "is a link" if kind in b"12" else f"is of the kind {kind!r}, not a file"
    if size > LARGEST:
        return f"has {size} bytes, more than the {LARGEST} that a member may have"
    return unsafe(name)


def _size(found: Header, named: dict[str, str]) -> int:
    """Bytes of content, from a pax record where there is a sound one."""
    told = named.get("size", "")
    sound = told.isascii() and told.isdigit() and len(told) < 20 and found.kind not in EMPTY
    return int(told) if sound else found.size


def _note(kind: bytes, content: bytes, named: dict[str, str], facts: dict[str, Any] | None) -> bool:
    """Keep what a record says of the next member, or of all. False when it is damaged."""
    if kind == b"L":
        named["path"] = _text(content)
    if kind not in b"xg":
        return True
    told, whole = pax_records(content)
    if kind == b"x":
        named.update(told)
    elif not facts and facts is not None and HEADER in told:
        try:
            given = json.loads(told[HEADER])
        except (ValueError, RecursionError):
            return False
        if not isinstance(given, dict) or _deeper(given, NESTED):
            return False
        facts.update(given)
    return whole


def _deeper(value: Any, levels: int) -> bool:
    """Whether plain data is nested more deeply than that."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(one, levels - 1) for one in inside)


def pax_records(content: bytes) -> tuple[dict[str, str], bool]:
    """Records "LENGTH KEY=VALUE\\n", and whether all were whole; those after a damaged one are lost."""
    found: dict[str, str] = {}
    place = 0
    while match := _RECORD.match(content, place):
        end = place + int(match[1])
        if end <= match.end() or content[end - 1 : end] != b"\n":
            break
        found[match[2].decode("utf-8", "backslashreplace")] = _text(content[match.end() : end - 1])
        place = end
    return found, not content[place:].strip(b"\0")


_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


def _number(field: bytes) -> int | None:
    """Octal digits, or base 256 with the top bit set (GNU); None when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.partition(b"\0")[0].strip()
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _text(field: bytes) -> str:
    """Up to the first NUL. Bytes that are not UTF-8 are written %E9, so that different names stay different."""
    raw = field.partition(b"\0")[0]
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "backslashreplace").replace("\\x", "%")


def _swallowed(read: Read, member: Member, block: bytes) -> int:
    """Where another header stands in the content of a member that damage follows, or 0: there it was cut, and more was joined.

    A tar within the tar holds headers of its own, and is left alone.
    """
    end = member.offset + member.size + -member.size % BLOCK
    if not block.strip(b"\0") or member.name.lower().endswith(".tar"):
        return 0
    inner = _next_header(read, member.offset, end)
    return inner if inner < end else 0


def _gap(read: Read, place: int, block: bytes, total: int) -> tuple[Damage | None, int]:
    """What stands where a header should, nothing for the end marker, and where to go on."""
    zeros = not block.strip(b"\0")
    end = _after_zeros(read, place, total) if zeros else place
    if end >= total:
        return None, total
    onward = _next_header(read, end, total)
    if zeros and onward == end and end - place >= 2 * BLOCK:
        return Damage("", f"another tar begins at byte {end}, as when `cat` joins two; it is read too", begins=end), end
    if place == 0 and onward >= total:
        why = next((why for start, why in _OTHERS.items() if block.startswith(start)), "is not a tar: it holds no header")
        return Damage("", why), total
    name = f"; the header there reads {shown(_text(block[:100]))}" if block[257:262] == b"ustar" else ""
    return Damage("", f"damaged from byte {place} to {onward}{name}"), onward


_PACKED = "is {}-compressed; members are read at their place in the file, so unpack it with `{}`"
_OTHERS = {
    b"\x1f\x8b": _PACKED.format("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": _PACKED.format("zstd", "unzstd"),
    b"\xfd7zXZ": _PACKED.format("xz", "unxz"),
    b"BZh": _PACKED.format("bzip2", "bunzip2"),
    b"PK\3\4": "is a zip, not a tar",
    b"version https://git-lfs": "is a pointer of Git LFS, not the tar; fetch it with `git lfs pull`",
    b"<": "is a web page, not a tar; the download has failed",
}


def _after_zeros(read: Read, place: int, total: int) -> int:
    """The first block from `place` on that is not all zero, or the end."""
    width = 2 * BLOCK  # doubled, so that many short gaps cost little and long ones too
    while place < total:
        chunk = read(place, width)
        if rest := chunk.lstrip(b"\0"):
            return place + (len(chunk) - len(rest)) // BLOCK * BLOCK
        place, width = place + width, min(2 * width, CHUNK)
    return total


def _next_header(read: Read, place: int, total: int) -> int:
    """The first block from `place` on that is a header with the right checksum, or the end."""
    width = 2 * BLOCK
    while place + BLOCK <= total:
        chunk = read(place, width)
        blocks = np.frombuffer(chunk, np.uint8, len(chunk) // BLOCK * BLOCK).reshape(-1, BLOCK)
        stated = blocks[:, 148:154]  # only where a checksum may stand is it worth while to take the sum
        for k in np.flatnonzero(_OCTAL[stated].all(1) & stated.any(1)).tolist():
            if parse(chunk[k * BLOCK : (k + 1) * BLOCK]):
                return place + k * BLOCK
        place, width = place + width, min(2 * width, CHUNK)
    return total


_OCTAL = np.isin(np.arange(256), list(b"01234567 \0"))
