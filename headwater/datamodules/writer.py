"""Write plain WebDataset tars, each with its index beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from headwater.datamodules.index import Row, assemble, content_hash, save_index
from headwater.datamodules.tar import BLOCK, LARGEST, LONGEST, global_header, header, unsafe


class ShardWriter:
    """Writes samples into `pattern.format(shard_number)`; a context manager.

    A shard appears under its name only when it is complete; when the block ends in an error, the open one is given up.

    Args:
        pattern: a path with one format field, such as "out/train-{:05d}.tar"; missing folders are made.
        samples, size: a shard is closed when it holds that many samples or bytes.
        header: facts of the whole source, plain data, kept at the head of every tar and in its index.
    """

    def __init__(
        self, pattern: str | Path, samples: int = 10_000, size: int = 1 << 30, header: dict[str, Any] | None = None
    ) -> None:
        self.pattern, self.samples, self.size, self.header = str(pattern), samples, size, header or {}
        self.shards: list[Path] = []
        self.written = 0
        self._file: BinaryIO | None = None

    def write(self, key: str, members: dict[str, bytes], hints: dict[str, float] | None = None) -> None:
        """Append one sample. key: no dot, unique; members: extension -> content; hints: lengths, such as {"wav.seconds": 2.5}."""
        if "." in key.rpartition("/")[2] or not key:
            raise ValueError(f"key {key!r} must be non-empty and hold no dot: WebDataset cuts the name at the first dot")
        if self._file is None:
            self._open()
        assert self._file is not None
        if key in self._rows:
            raise ValueError(f"key {key!r} was written before; keys must be unique within a shard")
        if len({extension.lower() for extension in members}) < len(members):
            raise ValueError(f"{key} has members {', '.join(members)}; expected extensions that differ in more than their case")
        row = Row(key, [], hints)
        for extension, content in members.items():
            if why := unsafe(f"{key}.{extension}"):
                raise ValueError(f"{key}.{extension} {why}; no reader would take it")
            if len(content) > LARGEST:
                raise ValueError(f"{key}.{extension} has {len(content)} bytes; expected at most {LARGEST}. Cut it into samples")
            head = header(f"{key}.{extension}", len(content))
            self._file.write(head)
            self._place += len(head)  # a long name takes blocks of its own
            row.members.append((extension.lower(), self._place, len(content), content_hash(content)))
            self._file.write(content)
            padding = -len(content) % BLOCK
            self._file.write(bytes(padding))
            self._place += len(content) + padding
        self._rows[key] = row
        self.written += 1
        if len(self._rows) >= self.samples or self._place >= self.size:
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
        save_index(assemble(str(path), self._rows.values(), header=self.header))

    def _open(self) -> None:
        path = Path(self.pattern.format(len(self.shards)))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.shards.append(path)
        self._rows: dict[str, Row] = {}
        self._file = _partial(path).open("wb", buffering=1 << 20)
        start = global_header(self.header) if self.header else b""
        if len(start) > LONGEST:
            raise ValueError(
                f"the header of the shards takes {len(start)} bytes; expected at most {LONGEST}. Keep large tables beside"
            )
        self._file.write(start)
        self._place = len(start)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or self._file is None:
            self.close()
        else:
            self._file.close()
            _partial(self.shards.pop()).unlink()
            self._file = None


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
