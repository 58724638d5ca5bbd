"""Where every sample of a tar shard lies: `name.tar.idx` beside `name.tar`.

A shard is a plain WebDataset tar: members of one sample share the name up to the first dot ("000017.png", "000017.txt").
The index is an Arrow file with one row per sample: its key, its members (kind, place, size, hash) and facts about their
length. A sample costs its key, 8 bytes, and 18 bytes per member. The file is mapped, not copied: a million samples take 20 ms
to open, in which their numbers are checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headwater.datamodules.files import File, filesystem, insist, is_remote
from headwater.datamodules.tar import BLOCK, Damage, Member, members, parse, shown

VERSION = 2
FAULTS = 1000  # that are kept by name; a hostile tar could hold millions
KINDS = (1 << 16) - 1  # extensions of a shard; their numbers have 16 bits
MEMBER = np.dtype([("kind", "<u2"), ("block", "<u4"), ("size", "<u4"), ("hash", "<u8")])  # hash 0 = not taken
MEMBERS = pa.list_(pa.struct([(name, pa.from_numpy_dtype(MEMBER[name])) for name in MEMBER.names or ()]))
HINT = "hint."
MAGIC = b"ARROW1"  # how every Arrow file begins
CHUNK = 1 << 18  # members that are checked at once


class Card(NamedTuple):
    """What a run must know of every shard from the start. header: facts of the source; hints: their names."""

    path: str
    samples: int
    extensions: tuple[str, ...]
    faults: tuple[str, ...]
    header: dict[str, Any]
    hints: tuple[str, ...]


Contents = dict[str, bytes]  # extension -> content, of one sample


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar, S of them with M members in all.

    keys: (S,) sample names. first: (S + 1,) where the members of each sample begin. kind: (M,) number of the extension.
    block: (M,) where the content begins, in blocks of 512 bytes. bytes: (M,) its size. hash: (M,) the first 8 bytes of
    BLAKE2b of the content, 0 = not taken. hints: name -> (S,) float32, NaN = unknown, such as "wav.seconds".
    """

    card: Card
    keys: pa.Array
    first: np.ndarray
    kind: np.ndarray
    block: np.ndarray
    bytes: np.ndarray
    hash: np.ndarray
    hints: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def path(self) -> str:
        """The tar."""
        return self.card.path

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of all members, sorted."""
        return self.card.extensions

    @property
    def faults(self) -> tuple[str, ...]:
        """What could not be indexed, as sentences that name the member."""
        return self.card.faults

    def key(self, row: int) -> str:
        """Name of a sample."""
        return self.keys[row].as_py()

    def extent(self, row: int, wanted: Collection[str] | None = None) -> Extent:
        """Where the members of a sample lie, or those with a wanted extension."""
        names = self.card.extensions
        first, last = self.first[row : row + 2].tolist()
        columns = self.kind[first:last].tolist(), self.block[first:last].tolist(), self.bytes[first:last].tolist()
        start, end, taken = 1 << 62, 0, 0
        members = []
        for kind, block, size in zip(*columns):  # a plain loop: this is asked for every sample
            if wanted is None or names[kind] in wanted:
                at = block * BLOCK
                start, end, taken = min(start, at), max(end, at + size), taken + size
                members.append((names[kind], at, size))
        return Extent(start, end - start, members, end - start > 2 * taken + 64 * BLOCK) if members else Extent(0, 0, [], False)

    def read(self, file: File, row: int, wanted: Collection[str] | None = None) -> Contents:
        """The members of a sample, or those with a wanted extension: extension -> bytes. OSError when the file is shorter."""
        extent = self.extent(row, wanted)
        if extent.scattered:
            return extent.whole({e: file.read(at, size) for e, at, size in extent.members})
        return extent.cut(file.read(extent.offset, extent.size))

    def sizes(self, extension: str) -> np.ndarray:
        """(S,) int64 bytes of the member of that extension, -1 where a sample lacks it."""
        out = np.full(len(self), -1, np.int64)
        if extension in self.extensions:
            mine = np.flatnonzero(self.kind == self.extensions.index(extension))
            out[np.searchsorted(self.first, mine, side="right") - 1] = self.bytes[mine]
        return out


class Extent(NamedTuple):
    """The bytes of one sample. members: (extension, offset, size). scattered: True when members of other samples lie between,
    so that one read would take in much that is not wanted."""

    offset: int
    size: int
    members: list[tuple[str, int, int]]
    scattered: bool

    def cut(self, content: bytes) -> dict[str, bytes]:
        """The members from the bytes of the whole extent."""
        start = self.offset
        found = {e: content[at - start : at - start + size] for e, at, size in self.members}
        return found if len(content) == self.size else self.whole(found)

    def whole(self, content: dict[str, bytes]) -> dict[str, bytes]:
        """`content` if nothing of it is missing, else OSError."""
        for extension, _, size in self.members:
            if len(content[extension]) < size:
                found = f"{extension} holds {len(content[extension])} of {size} bytes"
                raise OSError(f"{found}; the tar has changed since it was indexed: run `headwater index` on it")
        return content


class Row(NamedTuple):
    """One sample on its way into an index. members: (extension, offset in bytes, size, hash)."""

    key: str
    members: list[tuple[str, int, int, int]]
    hints: dict[str, float] | None = None


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: folder and stem up to the first dot are the key, the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def index_path(tar: str | Path) -> Path:
    """Where the index of a local tar lies: `name.tar.idx`, or beside that when it is another library's (Megatron-Energon's)."""
    beside = Path(f"{tar}.idx")
    try:
        with beside.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError:
        return beside
    return beside if start in (b"", MAGIC) else Path(f"{tar}.headwater.idx")


def content_hash(content: bytes) -> int:
    """64 bits of BLAKE2b; 0 is kept for "not taken"."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def scan(tar: str | Path, hashed: bool = False) -> ShardIndex:
    """Index a tar by walking its headers. What is damaged costs the samples that it touches and is named in `faults`.

    hashed: read the contents too, and keep their hashes.
    """
    rows: dict[str, dict[str, tuple[str, int, int, int]]] = {}
    faults: list[str] = []
    cut: set[tuple[str, str]] = set()
    kinds: set[str] = set()
    header: dict[str, Any] = {}
    begun = many = 0  # byte where the tar begins that is walked now, for several may be joined; number of faults
    with File(str(tar)) as file:
        for one in members(file.read, file.size, header):
            key, extension = split_name(one.name)
            found = rows.get(key, {})
            if isinstance(one, Damage):
                fault, begun = one.why, one.begins or begun
                if one.cut:
                    cut.add((key, extension))
            elif key.rpartition("/")[2].startswith("__"):
                continue  # names such as __index__ speak to WebDataset, not of a sample
            elif not (fault := _misplaced(one, key, extension, found, begun, kinds)):
                taken = content_hash(file.read(one.offset, one.size)) if hashed else 0
                found[extension] = (extension, one.offset, one.size, taken)
                rows[key] = found
                kinds.add(extension)
                continue
            many += 1
            if many <= FAULTS:
                faults.append(f"{tar}: {fault}")
    if many > FAULTS:
        faults.append(f"{tar}: and {many - FAULTS} more faults")
    spoiled = {key for key, extension in cut if extension not in rows.get(key, {})}  # elsewhere the member may be whole
    whole = (Row(key, list(found.values())) for key, found in rows.items() if key not in spoiled)
    return assemble(str(tar), whole, tuple(faults), header)


def _misplaced(one: Member, key: str, extension: str, found: dict[str, Any], begun: int, kinds: set[str]) -> str:
    """Why a whole member cannot be indexed, or "". found: what there is of its sample; kinds: all extensions so far."""
    why = ""
    if not extension or not key or key[-1] == "/":
        why = "has no key and extension; it is left out"
    elif extension in found:
        why = "appears twice; the first one is kept"
    elif found and next(iter(found.values()))[1] < begun:
        why = "has the name of a sample of the tar before, to which it was joined; it is left out"
    elif len(kinds) >= KINDS and extension not in kinds:
        why = f"has the extension number {KINDS + 1}; expected a few. Keys must not hold dots"
    elif one.offset // BLOCK >= 1 << 32:
        why = "lies beyond 2 TiB; cut the shard with `headwater reshard`"
    return f"{shown(one.name)} {why}" if why else ""


def assemble(path: str, rows: Iterable[Row], faults: tuple[str, ...] = (), header: dict[str, Any] | None = None) -> ShardIndex:
    """Columns from rows."""
    rows = list(rows)
    extensions = tuple(sorted({e for row in rows for e, *_ in row.members}))
    if len(extensions) > KINDS:
        raise ValueError(f"{path} holds {len(extensions)} extensions; expected a few. Keys must not hold dots")
    code = {e: number for number, e in enumerate(extensions)}
    table = np.array([(code[e], at // BLOCK, size, taken) for row in rows for e, at, size, taken in row.members], MEMBER)
    first = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row.members) for row in rows], out=first[1:])
    names = sorted({name for row in rows for name in row.hints or ()})
    hints = {n: np.array([(row.hints or {}).get(n, np.nan) for row in rows], np.float32) for n in names}
    card = Card(path, len(rows), extensions, faults, header or {}, tuple(names))
    keys = pa.array([row.key for row in rows], pa.string())
    kind, block, size, taken = (np.ascontiguousarray(table[field]) for field in MEMBER.names or ())
    return ShardIndex(card, keys, first, kind, block, size, taken, hints)


def save_index(index: ShardIndex) -> Path:
    """Write `name.tar.idx`, whole or not at all."""
    fields = [pa.array(column) for column in (index.kind, index.block, index.bytes, index.hash)]
    listed = pa.ListArray.from_arrays(pa.array(index.first), pa.StructArray.from_arrays(fields, names=list(MEMBER.names or ())))
    columns = {"key": index.keys, "members": listed, **{HINT + name: pa.array(value) for name, value in index.hints.items()}}
    note = {"version": VERSION, "bytes": os.path.getsize(index.path), **index.card._asdict()}
    del note["path"]
    table = pa.table(columns).replace_schema_metadata({"headwater": json.dumps(note)})
    target = index_path(index.path)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f"{target.name}.", suffix=".partial", delete=False) as partial:
        pass
    try:
        with pa.OSFile(partial.name, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], table.schema))
        os.chmod(partial.name, os.stat(index.path).st_mode & 0o666)  # who may read the tar may read its index
        os.replace(partial.name, target)
    finally:
        Path(partial.name).unlink(missing_ok=True)
    return target


def load_index(tar: str | Path) -> ShardIndex:
    """The index beside `tar`; scanned anew when it is missing, damaged or was written for another tar."""
    saved = saved_index(tar)
    if saved is not None:
        return saved
    if is_remote(str(tar)):
        raise FileNotFoundError(f"{tar} has no sound index beside it; `headwater index {tar}` makes it, or give the source a cache")
    index = scan(tar)
    with suppress(OSError):  # a folder that cannot be written to, a full disk: it is made anew next time
        save_index(index)
    return index


def saved_index(tar: str | Path) -> ShardIndex | None:
    """The index beside `tar` as it is, or None when there is none, it is damaged or was written for another tar."""
    found = _saved(str(tar))
    return _columns(*found) if found else None


def load_card(tar: str | Path) -> Card:
    """The facts of a shard without its columns, so that ten thousand shards can be known at once."""
    found = _saved(str(tar))
    return load_index(tar).card if found is None else found[1]


def _saved(tar: str) -> tuple[pa.RecordBatch, Card, int] | None:
    """The saved index and the bytes of its tar, or None when there is none, it is damaged, or was written for another tar."""
    if not is_remote(tar) and not os.path.exists(tar):
        raise FileNotFoundError(f"shard {tar} does not exist; check the path or glob, or write it with `headwater shard`")
    try:
        if is_remote(tar):
            store, name = filesystem(f"{tar}.idx")
            source = pa.BufferReader(insist(lambda: store.cat_file(name)))
        else:
            source = pa.memory_map(str(index_path(tar)))
    except (FileNotFoundError, pa.ArrowInvalid):  # the latter is what an empty file gives
        return None
    try:
        reader = pa.ipc.open_file(source)
        note = json.loads(reader.schema.metadata[b"headwater"])
        batch = reader.get_batch(0)  # one batch, mapped; joining chunks would copy
        lists = [note[k] for k in ("extensions", "faults", "hints")]
        plain = isinstance(note["header"], dict) and all(isinstance(one, list) for one in lists)
        if not plain or not all(isinstance(text, str) for one in lists for text in one):
            return None
        if note["version"] != VERSION or note["samples"] != len(batch) or not isinstance(note["bytes"], int):
            return None
    except Exception:  # Arrow raises many kinds of errors on damaged bytes; in all of them the index is made anew
        return None
    if not is_remote(tar) and note["bytes"] != os.path.getsize(tar):
        return None
    extensions, faults, hints = map(tuple, lists)
    return batch, Card(tar, len(batch), extensions, faults, note["header"], hints), note["bytes"]


def _columns(batch: pa.RecordBatch, card: Card, total: int) -> ShardIndex | None:
    """The columns of a saved index, mapped, or None when they contradict one another or lead out of the tar of `total` bytes.

    Arrow trusts the numbers in a file, and a wrong one would read foreign memory. This takes 20 ms for a million samples.
    """
    names = ["key", "members", *(HINT + name for name in card.hints)]
    try:
        if batch.schema.names != names or batch.schema.types != [pa.string(), MEMBERS, *[pa.float32() for _ in card.hints]]:
            return None
        batch.validate(full=True)
        keys, listed, *hints = batch.columns
        first = listed.offsets.to_numpy()
        kind, block, size, taken = (field.to_numpy() for field in listed.values.flatten())
        index = ShardIndex(card, keys, first, kind, block, size, taken, dict(zip(card.hints, (h.to_numpy() for h in hints))))
    except ValueError:  # numbers out of bounds, texts that are not UTF-8, or missing values
        return None
    parts = range(0, len(kind), CHUNK)  # not all at once, which would cost more memory than the index itself
    end = max((int((block[k : k + CHUNK].astype(np.int64) * BLOCK + size[k : k + CHUNK]).max()) for k in parts), default=0)
    inside = end <= total and first[0] == 0 and first[-1] == len(kind) and not keys.null_count and not listed.null_count
    return index if inside and (not len(kind) or (kind.max() < len(card.extensions) and block.min() > 0)) else None


def fits(index: ShardIndex, file: File) -> bool:
    """Whether the tar still has its last member where the index says: a tar of the same size may have taken its place."""
    if not len(index.block):
        return True
    at = int(index.block[-1]) * BLOCK - BLOCK
    header = parse(file.read(at, BLOCK))
    return header is not None and header.size == int(index.bytes[-1])
