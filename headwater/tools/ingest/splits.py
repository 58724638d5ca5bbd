"""Write samples into the shards of their split: the one that the source names, or train and validation by a hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from headwater.datamodules.writer import ShardWriter
from headwater.tools.engine import Engine, spread
from headwater.tools.ingest.members import Loaded, load
from headwater.tools.ingest.sources import Found, Sample, Skip

SPLITS = ("train", "validation", "test")
KNOWN = re.compile(r"(train(ing)?|dev(elopment)?|val(id|idation)?|eval(uation)?|test(ing)?)(?![a-z])")


class Written(NamedTuple):
    """shards: the tars; counts: split -> number of samples (under "samples") and of each member; skipped: all of them."""

    shards: set[Path]
    counts: dict[str, Counter[str]]
    skipped: list[Skip]


def split_of(name: str) -> str:
    """The set of shards that a named split goes to: "dev-clean" -> "validation"; a name of another kind stays as it is."""
    lower = re.sub(r"[^\w-]", "_", name.lower())
    found = KNOWN.match(lower)
    return {"tr": "train", "te": "test"}.get(found[0][:2], "validation") if found else lower


def shards_in(out: Path, splits: set[str]) -> set[Path]:
    """The shards of these splits that a folder holds."""
    return {path for split in splits for path in out.glob(f"{split}-*.tar")}


def write(
    found: Found, out: Path, samples: int, train: float, size: int | None, progress: bool, engine: Engine = "local"
) -> Written:
    """Write all samples that load. samples: per shard; train: share by hash; size: of larger images, see `load`."""
    written = Written(set(), {}, list(found.skipped))
    width = max(6, len(str(len(found.samples))))
    pattern = str(out).replace("{", "{{").replace("}", "}}") + "/%s-{:05d}.tar"
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as stack:
        for sample, loaded in track(
            _loaded(found.samples, size, engine), "writing", total=len(found.samples), disable=not progress
        ):
            if isinstance(loaded, Skip):
                written.skipped.append(loaded)
                continue
            split = sample.split or ("train" if place(sample.group or sample.name) < train else "validation")
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(pattern % split, samples, header=found.header))
            number = sum(writer.written for writer in writers.values())
            writers[split].write(f"{number:0{width}d}", loaded.members, loaded.hints)
            written.counts.setdefault(split, Counter()).update(["samples", *loaded.members])
    written.shards.update(path for writer in writers.values() for path in writer.shards)
    return written


def place(name: str) -> float:
    """From 0 to 1 by a hash: a sample keeps its split when others are added, and captions of one file stay together."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / (1 << 32)


def _loaded(samples: list[Sample], size: int | None, engine: Engine) -> Iterator[tuple[Sample, Loaded | Skip]]:
    """Samples in order, made and decoded by threads or by Ray, a few ahead so that memory stays small."""
    if engine == "ray":
        for result in spread(partial(load, size=size), samples, engine=engine):
            yield result.item, result.value or Skip(result.item.name, result.error)
        return
    ahead: deque[tuple[Sample, Future[Loaded | Skip]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for sample in samples:
            ahead.append((sample, pool.submit(load, sample, size)))
            if len(ahead) > 4 * (os.cpu_count() or 1):
                first, future = ahead.popleft()
                yield first, future.result()
        yield from ((sample, future.result()) for sample, future in ahead)
