"""Write plain WebDataset tars, each with its index beside it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from headwater.datamodules.index import BLOCK, assemble, save_index


class ShardWriter:
    """Writes samples into `pattern.format(shard_number)`; a context manager.

    pattern: a path with one format field, such as "out/train-{:05d}.tar"; missing folders are made.
    samples, size: a shard is closed when it holds that many samples or bytes.
    A shard appears under its name only when it is complete.
    """

    def __init__(self, pattern: str | Path, samples: int = 10_000, size: int = 1 << 30) -> None:
        self.pattern, self.samples, self.size = str(pattern), samples, size
        self.shards: list[Path] = []
        self.written = 0
        self._file: BinaryIO | None = None

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample. key: no dot, unique; members: extension -> content."""
        if "." in key.rpartition("/")[2] or not key:
            raise ValueError(f"key {key!r} must be non-empty and hold no dot: WebDataset cuts the name at the first dot")
        if self._file is None:
            self._open()
        if key in self._rows:
            raise ValueError(f"key {key!r} was written before; keys must be unique within a shard")
        self._rows[key] = {}
        for extension, content in members.items():
            self._file.write(_header(f"{key}.{extension}", len(content)))
            self._rows[key][extension.lower()] = (self._file.tell(), len(content))
            self._file.write(content)
            self._file.write(bytes(-len(content) % BLOCK))
        self.written += 1
        if len(self._rows) >= self.samples or self._file.tell() >= self.size:
            self.close()

    def close(self) -> None:
        """End the open shard: two empty blocks, then its final name, then the index."""
        if self._file is None:
            return
        self._file.write(bytes(2 * BLOCK))
        self._file.close()
        self._file = None
        path = self.shards[-1]
        os.replace(_partial(path), path)
        save_index(assemble(str(path), self._rows))

    def _open(self) -> None:
        path = Path(self.pattern.format(len(self.shards)))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.shards.append(path)
        self._rows: dict[str, dict[str, tuple[int, int]]] = {}
        self._file = _partial(path).open("wb")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _header(name: str, size: int) -> bytes:
    """Same bytes for same content: no clock, no user."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)
