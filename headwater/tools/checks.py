"""What can be wrong in one shard: its tar, its index, its samples, its members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from headwater.datamodules.faults import PICKLES, said
from headwater.datamodules.files import File
from headwater.datamodules.index import BLOCK, ShardIndex, content_hash, scan
from headwater.tools.decode import KIND, describe
from headwater.tools.index_shards import current
from headwater.tools.remote import fetched, named, size_of
from headwater.tools.sets import key_prints

BROKEN = ("unreadable", "tar", "index", "interleaved", "hash", "empty", "decode")  # all other kinds are notes
KNOWN = {*KIND, *PICKLES, "text", "caption"}
FACTS = ("Hz", "channels", "mode", "dtype")  # of decoded members, counted by value


class Problem(NamedTuple):
    """Something that was found. kind: one of BROKEN, or of a note; key, member: "" where it is not about one."""

    shard: str
    kind: str
    key: str
    member: str
    why: str


class Checked(NamedTuple):
    """One shard after the check. facts: (extension, fact, value) -> members; prints: (S,) hashes of its keys."""

    path: str
    samples: int
    members: int
    problems: list[Problem]
    facts: Counter[tuple[str, str, str]]
    prints: np.ndarray


def check(path: str, decode: bool = False) -> Checked:
    """Everything that one shard alone tells. decode: decode its members too. Raises OSError when it cannot be read."""
    saved = current(path)
    facts: Counter[tuple[str, str, str]] = Counter()
    with fetched(path) as local, File(local) as file:
        index = named(scan(local), path)
        problems = [Problem(path, "tar", "", "", fault.removeprefix(f"{path}: ")) for fault in index.faults]
        problems += [*_index(saved, index), *_kinds(index), *_samples(index)]
        hashes = saved.hash if saved is not None and _same(saved, index) else np.zeros(len(index.kind), np.uint64)
        problems += _contents(index, hashes, file, facts if decode else None)
    return Checked(path, len(index), len(index.kind), problems, facts, key_prints(index))


def _index(saved: ShardIndex | None, index: ShardIndex) -> Iterator[Problem]:
    """Is the index beside the tar there, is it of this tar, and can it show that a member has changed?"""
    if saved is None and not size_of(index.path):
        yield Problem(index.path, "no index", "", "", "has no index; `headwater index` makes it")
    elif saved is None or not _same(saved, index):
        yield Problem(index.path, "index", "", "", "has an index of another tar or another version; run `headwater index --force`")
    elif not saved.hash.all():
        yield Problem(index.path, "no hashes", "", "", "has members without a hash: changes do not show; run `headwater index`")


def _same(saved: ShardIndex, index: ShardIndex) -> bool:
    """Whether both say the same about which member is where."""
    pairs = ((saved.first, index.first), (saved.kind, index.kind), (saved.block, index.block), (saved.bytes, index.bytes))
    return saved.extensions == index.extensions and saved.keys.equals(index.keys) and all(np.array_equal(a, b) for a, b in pairs)


def _kinds(index: ShardIndex) -> Iterator[Problem]:
    """Members that nobody reads, and members that most samples have and some lack."""
    for extension in index.extensions:
        there = index.sizes(extension) >= 0
        count, last = int(there.sum()), extension.rpartition(".")[2]
        if last in PICKLES:
            why = f"{count} members are pickles, which run code when they are read; they are never read here"
            yield Problem(index.path, "pickle", "", extension, why)
        elif last not in KNOWN:
            yield Problem(index.path, "unknown", "", extension, f"{count} members are of a kind that no reader of headwater takes")
        if len(index) / 2 < count < len(index):
            without = np.flatnonzero(~there)
            first = ", ".join(index.key(row) for row in without[:3].tolist())
            why = f"{len(without)} of {len(index)} samples lack it, such as {first}; most have it"
            yield Problem(index.path, "lacking", "", extension, why)


def _samples(index: ShardIndex) -> Iterator[Problem]:
    """Samples that other readers of WebDataset would cut in pieces, and keys that some file systems do not tell apart."""
    owner = np.repeat(np.arange(len(index)), np.diff(index.first))[np.argsort(index.block, kind="stable")]
    runs = np.bincount(owner[np.flatnonzero(np.diff(owner, prepend=-1))], minlength=len(index))
    for row in np.flatnonzero(runs > 1).tolist():
        why = "has members of other samples between its own: stock webdataset cuts it in pieces; `headwater reshard` mends it"
        yield Problem(index.path, "interleaved", index.key(row), "", why)
    spellings: dict[str, list[str]] = {}
    for key in index.keys.to_pylist():
        spellings.setdefault(key.casefold(), []).append(key)
    for first, *others in spellings.values():
        if others:
            yield Problem(index.path, "case", first, "", f"differs from {', '.join(others)} in upper and lower case only")


def _contents(index: ShardIndex, hashes: np.ndarray, file: File, facts: Counter[tuple[str, str, str]] | None) -> Iterator[Problem]:
    """Members that are empty, have changed, or do not decode. facts: counted here; None = do not decode."""
    owner = np.repeat(np.arange(len(index)), np.diff(index.first))
    for member, (row, kind, taken) in enumerate(zip(owner.tolist(), index.kind.tolist(), hashes.tolist())):
        extension, size = index.extensions[kind], int(index.bytes[member])
        content = file.read(int(index.block[member]) * BLOCK, size)
        if not size:
            yield Problem(index.path, "empty", index.key(row), extension, "is empty (0 bytes)")
        elif taken and content_hash(content) != taken:
            yield Problem(index.path, "hash", index.key(row), extension, "has changed since its hash was taken")
        elif facts is not None:
            try:
                found = describe(extension, content)
            except Exception as error:  # decoders raise nearly anything on bad bytes
                yield Problem(index.path, "decode", index.key(row), extension, f"does not decode: {said(error)}")
                continue
            facts.update((extension, name, str(found[name])) for name in FACTS if name in found)
