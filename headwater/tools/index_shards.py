"""Make or complete the indices of shards: `headwater index out/ --measure`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from headwater.datamodules.faults import said
from headwater.datamodules.files import File, expand
from headwater.datamodules.index import BLOCK, ShardIndex, content_hash, fits, saved_index, scan
from headwater.tools.engine import Engine, Result, spread
from headwater.tools.lengths import measure, promised
from headwater.tools.remote import absolute, fetched, named, save, size_of
from headwater.tools.sets import sets_of

SHOWN = 20  # faults that are printed


class Indexed(NamedTuple):
    """One shard after the command. state: "current", "completed" or "made"; bytes: of the index; faults: sentences."""

    path: str
    state: str
    samples: int
    bytes: int
    faults: list[str]


def index_shards(
    shards: str,
    jobs: int | None = None,
    measure: bool = False,
    tokenizer: str | None = None,
    force: bool = False,
    engine: Engine = "local",
) -> None:
    """Make the index beside every shard, with a hash of every member.

    Shards whose index is there, fits and holds all that is asked for are left alone. Facts in an index that the writer noted
    are kept. Of a remote shard, the index is written into its store. Faults are listed; only what cannot be read is an error.

    Args:
        shards: a tar, a folder, a glob, a brace range or a URL.
        jobs: shards at once; default: as many as there are cores.
        measure: note how long or large members are, by their headers: width and height of pictures, seconds of sounds, frames,
            seconds and fps of films, steps of arrays, words of texts.
        tokenizer: a tokenizer.json, or "bytes"; note how many tokens the texts have.
        force: make the index anew even where it fits.
        engine: local = processes of this machine; ray = tasks of a Ray cluster.
    """
    paths = absolute(expand(shards), engine)
    hints_of("txt", measure, tokenizer)  # a tokenizer that is not there is told once, not by every shard
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    work = partial(index_one, measured=measure, tokenizer=tokenizer, force=force)
    spreading = spread(work, paths, jobs, engine)
    results = list(track(spreading, "indexing", total=len(paths), disable=not console.is_terminal))
    report(results, console)
    if failed := [result for result in results if result.error]:
        raise SystemExit(f"{len(failed)} of {len(results)} shards could not be indexed; see the errors above")


def index_one(path: str, measured: bool = False, tokenizer: str | None = None, force: bool = False) -> Indexed:
    """Make or complete the index of one shard; see `index_shards`. Raises OSError when the shard cannot be read."""
    saved = current(path)
    if saved is not None and not force and not lacking(saved, measured, tokenizer):
        return Indexed(path, "current", len(saved), size_of(path), list(saved.faults))
    with fetched(path) as local, File(local) as file:
        if saved is None:
            index = named(scan(local), path)
        else:
            index = carry(saved, named(scan(local, hashed=True), path)) if force else saved
        index, faults = complete(index, file, measured, tokenizer)
        save(index, local)
    state = "made" if saved is None or force else "completed"
    return Indexed(path, state, len(index), size_of(path), [*index.faults, *faults])


def current(path: str) -> ShardIndex | None:
    """The index beside a shard, or None when it is missing, damaged, or of another tar."""
    index = saved_index(path)
    if index is None:
        return None
    with File(path) as file:
        return index if fits(index, file) else None


def carry(old: ShardIndex, new: ShardIndex) -> ShardIndex:
    """The new index with the hints of those samples whose members are what and where they were by the old one."""
    hints = {name: np.full(len(new), np.nan, np.float32) for name in old.hints}
    places = {key: row for row, key in enumerate(old.keys.to_pylist())}
    for row, key in enumerate(new.keys.to_pylist()):
        before = places.get(key, -1)
        if before < 0 or new.extent(row) != old.extent(before) or not _unchanged(_hashes(old, before), _hashes(new, row)):
            continue
        for name, column in old.hints.items():
            hints[name][row] = column[before]
    return _with(new, new.hash, hints)


def _hashes(index: ShardIndex, row: int) -> np.ndarray:
    return index.hash[index.first[row] : index.first[row + 1]]


def _unchanged(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether all hashes agree that were taken both times."""
    return bool(((old == new) | (old == 0) | (new == 0)).all())


def lacking(index: ShardIndex, measured: bool, tokenizer: str | None) -> bool:
    """Whether a hash or a hint that is asked for is missing."""
    asked = {e: hints_of(e, measured, tokenizer) for e in index.extensions}
    unknown = np.full(len(index), np.nan)
    return not index.hash.all() or any(
        np.isnan(index.hints.get(name, unknown)[index.sizes(e) >= 0]).any() for e, names in asked.items() for name in names
    )


def hints_of(extension: str, measured: bool, tokenizer: str | None) -> tuple[str, ...]:
    """Names of the hints that a member should have."""
    names = promised(extension) if measured else ()
    if tokenizer is None or extension.rpartition(".")[2] not in (reader := _reader(tokenizer)).extensions:
        return names
    return (*names, f"{extension}.tokens-{reader.digest}")


def complete(index: ShardIndex, file: File, measured: bool = False, tokenizer: str | None = None) -> tuple[ShardIndex, list[str]]:
    """The index with all hashes and the hints that are asked for, and what could not be measured. Reads only what it lacks."""
    hashes, hints, faults = index.hash.copy(), {name: column.copy() for name, column in index.hints.items()}, []
    asked = [hints_of(e, measured, tokenizer) for e in index.extensions]
    for name in (name for names in asked for name in names if name not in hints):
        hints[name] = np.full(len(index), np.nan, np.float32)
    owner = np.repeat(np.arange(len(index)), np.diff(index.first))
    for member, (row, kind) in enumerate(zip(owner.tolist(), index.kind.tolist())):
        missing = [name for name in asked[kind] if np.isnan(hints[name][row])]
        if hashes[member] and not missing:
            continue
        content = file.read(int(index.block[member]) * BLOCK, int(index.bytes[member]))
        hashes[member] = hashes[member] or content_hash(content)
        try:
            found = _measure(index.extensions[kind], content, missing, tokenizer) if missing else {}
        except Exception as error:  # decoders raise nearly anything on bad bytes
            faults.append(f"{index.path}: {index.key(row)}.{index.extensions[kind]} cannot be measured: {said(error)}")
            continue
        for name, value in found.items():
            hints[name][row] = value
    return _with(index, hashes, hints), faults


def _measure(extension: str, content: bytes, missing: list[str], tokenizer: str | None) -> dict[str, float]:
    found = measure(extension, content) if set(missing) & set(promised(extension)) else {}
    if tokens := [name for name in missing if name not in promised(extension)]:
        found[tokens[0]] = _reader(str(tokenizer)).count(content)
    return found


@lru_cache(maxsize=1)
def _reader(tokenizer: str) -> Any:
    from headwater.modalities.text import TextReader

    return TextReader(tokenizer)


def _with(index: ShardIndex, hashes: np.ndarray, hints: dict[str, np.ndarray]) -> ShardIndex:
    hints = dict(sorted(hints.items()))
    return replace(index, card=index.card._replace(hints=tuple(hints)), hash=hashes, hints=hints)


def report(results: list[Result], console: Console) -> None:
    """A row per set of shards, then the faults and errors."""
    table = Table(
        Column("index of", overflow="fold", min_width=24), "shards", "indexed now", "samples", "faults", "bytes per sample"
    )
    done: dict[str, list[Indexed]] = {}
    for name, result in zip(sets_of([result.item for result in results]), results):
        done.setdefault(name, []).extend([] if result.error else [result.value])
    for name, of in done.items():
        samples, size = sum(one.samples for one in of), sum(one.bytes for one in of)
        counts = (len(of), sum(one.state != "current" for one in of), samples, sum(len(one.faults) for one in of))
        table.add_row(name, *(f"{count:,}" for count in counts), f"{size / max(samples, 1):.1f}")
    console.print(table)
    faults = [fault for of in done.values() for one in of for fault in one.faults]
    for fault in faults[:SHOWN]:
        console.print(f"fault: {fault}")
    if len(faults) > SHOWN:
        console.print(f"and {len(faults) - SHOWN:,} more; `headwater verify` writes all of them to a file")
    for result in results:
        if result.error:
            console.print(f"error: {result.item}: {result.error}")
