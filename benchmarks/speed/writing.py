"""Writing tars, and decoding with no loader around it: the two limits that loaders are held against."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.speed.samples import Sample
from benchmarks.speed.stopwatch import Row
from headwater.datamodules.writer import ShardWriter

PIECE, SHARD = 64, 1000  # samples per timed step and per tar


def rows(samples: list[Sample]) -> list[Row]:
    """headwater's writer with its index, and webdataset's, which writes none. Steps of 64 samples from memory."""

    def row(name: str, write: Callable[[Path, Iterator[Sample]], Iterator[None]]) -> Row:
        def steps(folder: Path) -> Iterator[Path]:
            try:
                for number, _ in enumerate(write(folder, itertools.cycle(samples)), 1):
                    if number % PIECE == 0:
                        yield folder
            finally:
                shutil.rmtree(folder)

        def look(stream: Iterator[Path]) -> str:
            folder = next(itertools.islice(stream, SHARD // PIECE, None))  # when the first tar is complete
            tar, *others = sorted(path for path in folder.iterdir() if "000000" in path.name)
            return f"{tar.stat().st_size / 1e6:.2f} MB" + "".join(f" + {o.suffix} {o.stat().st_size / 1e6:.2f} MB" for o in others)

        return Row(name, lambda: steps(Path(tempfile.mkdtemp(prefix="headwater-bench-"))), lambda folder: PIECE, look)

    return [row("headwater", headwater), row("webdataset", webdataset)]


def headwater(folder: Path, samples: Iterator[Sample]) -> Iterator[None]:
    with ShardWriter(folder / "{:06d}.tar", samples=SHARD) as writer:
        for key, members in samples:
            writer.write(key, members)
            yield


def webdataset(folder: Path, samples: Iterator[Sample]) -> Iterator[None]:
    import webdataset as wds

    with wds.ShardWriter(str(folder / "%06d.tar"), maxcount=SHARD, verbose=0) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
            yield


def bare(contents: list[bytes], batch: int) -> Row:
    """simplejpeg in a loop over JPEG bytes that lie in memory."""
    import simplejpeg

    def steps() -> Iterator[int]:
        endless = itertools.cycle(contents)
        while True:
            for content in itertools.islice(endless, batch):
                simplejpeg.decode_jpeg(content, "RGB")
            yield batch

    return Row("simplejpeg alone", steps, lambda size: size, lambda stream: f"{len(contents)} pictures in memory")
