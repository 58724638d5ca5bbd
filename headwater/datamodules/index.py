"""Where every sample of a tar shard lies: `name.tar.idx` beside `name.tar`.

A shard is a plain WebDataset tar: members of one sample stand together and share the name up to the first dot
("000017.png", "000017.txt"). The index is an Arrow file with one row per sample: its key and, per extension, the
byte offset and size of that member (size -1: absent). About 12 bytes per member plus the key; opened by memory map.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

VERSION = 1
BLOCK = 512


class ShardIndex(NamedTuple):
    """The samples of one tar.

    keys: (S,) sample names. offset, size: extension -> (S,) int64 bytes; size -1 where a sample lacks the member.
    faults: what could not be indexed, as sentences that name the member.
    """

    path: str
    keys: pa.Array
    offset: dict[str, np.ndarray]
    size: dict[str, np.ndarray]
    faults: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(self.size)

    def read(self, descriptor: int, row: int) -> dict[str, bytes]:
        """The members of sample `row`, extension -> bytes, read from an open file descriptor of the tar."""
        found = ((e, int(self.offset[e][row]), int(self.size[e][row])) for e in self.size)
        return {e: os.pread(descriptor, size, offset) for e, offset, size in found if size >= 0}


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: folder and stem up to the first dot are the key, the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def index_path(tar: str | Path) -> Path:
    """Where the index of a tar lies."""
    return Path(f"{tar}.idx")


def scan(tar: str | Path) -> ShardIndex:
    """Index a tar by walking its headers. A damaged tail costs the samples in it and is named in `faults`."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    faults = []
    total = os.path.getsize(tar)
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                key, extension = split_name(member.name)
                if member.offset_data + member.size > total:
                    faults.append(f"{tar}: {member.name} is cut off ({total} of {member.offset_data + member.size} bytes)")
                elif extension in rows.setdefault(key, {}):
                    faults.append(f"{tar}: {member.name} appears twice; the first one is kept")
                else:
                    rows[key][extension] = (member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)  # tarfile takes every bad header but the first for the end
            if archive.offset <= total and archive.fileobj.read(BLOCK) != bytes(BLOCK):
                faults.append(f"{tar}: damaged or cut at byte {archive.offset}; {len(rows)} samples before that are kept")
    except tarfile.ReadError as error:
        faults.append(f"{tar}: {error}; {len(rows)} samples before that are kept")
    cut = {split_name(f.split(": ", 1)[1].split(" is cut off")[0])[0] for f in faults if " is cut off" in f}
    return assemble(str(tar), {k: v for k, v in rows.items() if v and k not in cut}, tuple(faults))


def assemble(path: str, rows: dict[str, dict[str, tuple[int, int]]], faults: tuple[str, ...] = ()) -> ShardIndex:
    """Columns from rows: key -> extension -> (offset, size)."""
    extensions = sorted({e for members in rows.values() for e in members})
    place = {e: np.array([m.get(e, (0, -1)) for m in rows.values()], np.int64).reshape(-1, 2) for e in extensions}
    return ShardIndex(
        path, pa.array(rows, pa.string()), {e: p[:, 0] for e, p in place.items()}, {e: p[:, 1] for e, p in place.items()}, faults
    )


def save_index(index: ShardIndex) -> Path:
    """Write `name.tar.idx`, whole or not at all."""
    columns = {"key": index.keys}
    for e in index.extensions:
        columns[f"offset.{e}"], columns[f"size.{e}"] = index.offset[e], index.size[e]
    note = {"version": VERSION, "bytes": os.path.getsize(index.path), "faults": index.faults}
    table = pa.table(columns).replace_schema_metadata({"headwater": json.dumps(note)})
    target = index_path(index.path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(partial, target)
    return target


def load_index(tar: str | Path) -> ShardIndex:
    """The index beside `tar`; scanned anew when it is missing, damaged or was written for a tar of another size."""
    if not os.path.exists(tar):
        raise FileNotFoundError(f"shard {tar} does not exist; check the path or glob, or write it with `headwater shard`")
    beside = index_path(tar)
    found = _read(tar, beside)
    if found is not None:
        return found
    index = scan(tar)
    if os.access(beside.parent, os.W_OK):
        save_index(index)
    return index


def _read(tar: str | Path, beside: Path) -> ShardIndex | None:
    """The saved index, or None when there is none, it is damaged, or it was written for a tar of another size."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(beside))).read_all()
        note = json.loads(table.schema.metadata[b"headwater"])
    except (FileNotFoundError, pa.ArrowInvalid, TypeError, KeyError, ValueError):
        return None
    if note["version"] != VERSION or note["bytes"] != os.path.getsize(tar):
        return None
    column = {n: table[n].to_numpy() for n in table.column_names if n != "key"}
    extensions = [n.removeprefix("size.") for n in column if n.startswith("size.")]
    offset, size = ({e: column[f"{kind}.{e}"] for e in extensions} for kind in ("offset", "size"))
    return ShardIndex(str(tar), table["key"].combine_chunks(), offset, size, tuple(note["faults"]))
