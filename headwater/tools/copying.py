"""Copy samples to new shards: their bytes as they are, with hints and headers, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from json import dumps
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from headwater.datamodules.files import File, is_remote
from headwater.datamodules.index import ShardIndex, content_hash, index_path
from headwater.datamodules.writer import ShardWriter
from headwater.tools.decode import in_bytes
from headwater.tools.parts import Part, opened
from headwater.tools.remote import fetched

OPEN = 64  # shards that are open at once when samples are sorted; of remote ones, so many copies lie on the disk
SKIPPED = "skipped.jsonl"
SHOWN = 10  # sentences that are printed
Sort = Literal["key", "none"]


class Copied(NamedTuple):
    """shards, samples, size: of each new set, size in bytes; skipped: sentences."""

    shards: Counter[str]
    samples: Counter[str]
    size: Counter[str]
    skipped: list[str]


def copy(
    parts: Sequence[Part], folder: Path, name_of: Callable[[Part, str], str], samples: int, size: int, sort: Sort, copied: Copied
) -> None:
    """Copy the samples of all parts to folder/NAME-00000.tar and so on, and count them in `copied`.

    A member whose bytes are not those of its hash costs its sample. A shard holds samples of one header only.

    Args:
        name_of: part and key -> NAME. samples, size: a shard is closed when it holds that many samples or bytes.
    """
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as stack:
        shard = stack.enter_context(_opening(1 if sort == "none" else OPEN))
        for part, row in track(
            _ordered(parts, sort), "copying", total=sum(len(p.rows) for p in parts), disable=not Console().is_terminal
        ):
            index, file = shard(part.path)
            key, members = index.key(row), index.read(file, row)
            if changed := _changed(index, row, members):
                copied.skipped.append(f"{part.path}: {key}.{changed} has changed since its hash was taken")
                continue
            name = name_of(part, key)
            if name not in writers:
                writers[name] = stack.enter_context(ShardWriter(_pattern(folder, name), samples, size))
            writer = writers[name]
            if writer.header != part.header:
                writer.close()
                writer.header = part.header
            writer.write(part.prefix + key, members, row_hints(index, row))
    copied.skipped.extend(fault for part in parts for fault in part.faults)
    for name, writer in writers.items():
        copied.shards[name] += len(writer.shards)
        copied.samples[name] += writer.written
        copied.size[name] += sum(path.stat().st_size for path in writer.shards)


def row_hints(index: ShardIndex, row: int) -> dict[str, float]:
    """What the index notes of one sample."""
    return {name: float(column[row]) for name, column in index.hints.items() if not np.isnan(column[row])}


def _changed(index: ShardIndex, row: int, members: dict[str, bytes]) -> str:
    """The first member that does not have the hash of the index, or ""."""
    first, last = index.first[row], index.first[row + 1]
    taken = {index.extensions[k]: h for k, h in zip(index.kind[first:last].tolist(), index.hash[first:last].tolist())}
    return next((e for e, content in members.items() if taken[e] and content_hash(content) != taken[e]), "")


def _pattern(folder: Path, name: str) -> str:
    return str(folder / name).replace("{", "{{").replace("}", "}}") + "-{:05d}.tar"


def _ordered(parts: Sequence[Part], sort: Sort) -> Iterator[tuple[Part, int]]:
    """Part and row of every sample, in the order of the parts, or by the keys under which they are written."""
    if sort == "none":
        yield from ((part, row) for part in parts for row in part.rows.tolist())
        return
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = [pc.binary_join_element_wise(p.prefix, opened(p.path).keys.take(pa.array(p.rows)), "") for p in parts]
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    for place in pc.sort_indices(pa.chunked_array(keys, pa.string())).to_numpy().astype(np.int64):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        yield parts[number], int(parts[number].rows[place - starts[number]])


@contextmanager
def _opening(most: int) -> Iterator[Callable[[str], tuple[ShardIndex, File]]]:
    """Gives index and file of shards; the least recently used of more than `most` is closed."""
    held: OrderedDict[str, tuple[ShardIndex, File, ExitStack]] = OrderedDict()

    def shard(path: str) -> tuple[ShardIndex, File]:
        if path not in held:
            if len(held) >= most:
                held.popitem(last=False)[1][2].close()
            with ExitStack() as stack:
                file = stack.enter_context(File(stack.enter_context(fetched(path))))
                held[path] = opened(path), file, stack.pop_all()
        held.move_to_end(path)
        return held[path][:2]

    try:
        yield shard
    finally:
        for _, _, stack in held.values():
            stack.close()


def local(out: str) -> Path:
    """The folder to write to; ValueError for a URL."""
    if is_remote(out):
        raise ValueError(f"{out} is remote; expected a local folder for the shards; upload it when they are written")
    return Path(out)


@contextmanager
def staged(out: Path, sources: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """A folder OUT.partial in which shards are written; when the block ends well, they are moved to `out`.

    A run that is stopped leaves OUT.partial, which the next one removes. ValueError when `out` holds shards that may not be
    replaced, or the sources themselves.
    """
    if any(Path(source).resolve().parent == out.resolve() for source in sources):
        raise ValueError(f"{out} holds the shards that are read; expected another folder to write to")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder for the shards; give another path")
    old = sorted(out.glob("*.tar"))
    if old and not overwrite:
        raise ValueError(f"{out} holds {len(old)} shards; expected none; give another folder, or --overwrite to replace them")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if out.exists() and any(out.iterdir()):
        _move(partial, out, old)
    else:
        partial.rename(out)


def _move(partial: Path, out: Path, old: Sequence[Path]) -> None:
    """Put new files among those that a folder has, and remove the shards that were there."""
    new = sorted(partial.iterdir())  # a tar comes before its index
    for path in new:
        index_path(out / path.name).unlink(missing_ok=True)  # at no moment does the old index stand beside the new tar
        os.replace(path, out / path.name)
    for path in {*old, out / SKIPPED} - {out / path.name for path in new}:
        path.unlink(missing_ok=True)
        index_path(path).unlink(missing_ok=True)
    partial.rmdir()


def report(copied: Copied, folder: Path, out: Path, console: Console) -> None:
    """Print what was written; what was left out goes to skipped.jsonl too."""
    table = Table("set", "shards", "samples", "bytes", title=str(out))
    for name in sorted(copied.samples):
        table.add_row(name, f"{copied.shards[name]:,}", f"{copied.samples[name]:,}", in_bytes(copied.size[name]))
    console.print(table)
    for sentence in copied.skipped[:SHOWN]:
        console.print(f"left out: {sentence}")
    if copied.skipped:
        lines = "".join(dumps({"reason": sentence}, ensure_ascii=False) + "\n" for sentence in copied.skipped)
        (folder / SKIPPED).write_text(lines, encoding="utf-8")
        console.print(f"{len(copied.skipped):,} things could not be copied; {out / SKIPPED} lists them")
