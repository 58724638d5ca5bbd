"""What the indices of shards tell, without reading the shards: `headwater stats out/ --json stats.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from headwater.datamodules.files import expand
from headwater.datamodules.index import load_index
from headwater.tools.decode import in_bytes
from headwater.tools.remote import size_of
from headwater.tools.sets import content_prints, sets_of

BATCH = 256  # samples per step for which shuffling is judged
QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}


def stats(shards: str, json: str | None = None) -> None:
    """Print what the indices of shards tell, without reading the shards.

    For each set: how many members of each kind and how large, the lengths that the indices note, samples that are the same
    bytes, how well the default order shuffles, and the facts of the header.

    Args:
        shards: a tar, a folder, a glob, a brace range or a URL.
        json: file for the same as numbers.
    """
    paths = expand(shards)
    sets: dict[str, list[str]] = {}
    for name, path in zip(sets_of(paths), paths):
        sets.setdefault(name, []).append(path)
    measured = {name: measure_set(of) for name, of in sets.items()}
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for name, told in measured.items():
        show(name, told, console)
    if json is not None:
        Path(json).write_text(dumps(measured, indent=1, ensure_ascii=False), encoding="utf-8")
        console.print(f"written to {json}")


def measure_set(paths: Sequence[str]) -> dict[str, Any]:
    """One set as plain data.

    members: extension -> count, total, min, median, max bytes. hints: name -> known samples and quantiles. copies: samples that
    are the same bytes as an earlier one, among those that are `hashed`. shuffle: see `order.quality`, None without samples.
    """
    sizes: dict[str, list[np.ndarray]] = {}
    hints: dict[str, list[np.ndarray]] = {}
    headers: Counter[str] = Counter()
    counts, prints, faults = [], [np.empty(0, np.uint64)], 0
    for path in paths:
        index = load_index(path)
        counts.append(len(index))
        faults += len(index.faults)
        headers[dumps(index.card.header, sort_keys=True)] += 1
        prints.append(content_prints(index))
        for kind, extension in enumerate(index.extensions):
            sizes.setdefault(extension, []).append(index.bytes[index.kind == kind])
        for name, column in index.hints.items():
            hints.setdefault(name, []).append(column[~np.isnan(column)])
    hashed = np.concatenate(prints)
    hashed = hashed[hashed > 0]
    return {
        "shards": len(paths),
        "samples": sum(counts),
        "faults": faults,
        "members": {extension: _bytes(np.concatenate(parts)) for extension, parts in sorted(sizes.items())},
        "hints": {name: _quantiles(np.concatenate(parts)) for name, parts in sorted(hints.items())},
        "index_bytes_per_sample": sum(map(size_of, paths)) / max(sum(counts), 1),
        "hashed": len(hashed),
        "copies": len(hashed) - len(np.unique(hashed)),
        "shuffle": _shuffle(counts),
        "headers": [{"shards": count, "header": loads(header)} for header, count in headers.items()],
    }


def _bytes(sizes: np.ndarray) -> dict[str, float]:
    total = int(sizes.sum(dtype=np.int64))
    return {
        "count": len(sizes),
        "total": total,
        "min": int(sizes.min()),
        "median": float(np.median(sizes)),
        "max": int(sizes.max()),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"known": 0}
    return {"known": len(values), **dict(zip(QUANTILES, np.quantile(values, [*QUANTILES.values()]).tolist()))}


def _shuffle(counts: Sequence[int]) -> dict[str, float] | None:
    from headwater.datamodules.order import Order, quality

    return dict(quality(Order(counts, seed=0), BATCH)._asdict()) if sum(counts) else None


def show(name: str, told: dict[str, Any], console: Console) -> None:
    """Print what `measure_set` found."""
    faults = f", {told['faults']:,} faults" if told["faults"] else ""
    index = f"index {told['index_bytes_per_sample']:.1f} bytes per sample"
    console.print(f"{name}: {told['shards']:,} shards, {told['samples']:,} samples{faults}, {index}")
    members = Table("member", "count", "all", "min", "median", "max")
    for extension, of in told["members"].items():
        members.add_row(extension, f"{of['count']:,}", *(in_bytes(of[what]) for what in ("total", "min", "median", "max")))
    console.print(members)
    if told["hints"]:
        lengths = Table("length", "known", *QUANTILES)
        for hint, of in told["hints"].items():
            lengths.add_row(hint, f"{of['known']:,}", *(f"{of[quantile]:.5g}" for quantile in QUANTILES if quantile in of))
        console.print(lengths)
    copies = f"{told['copies']:,} of {told['hashed']:,} samples are copies of others"
    unhashed = told["samples"] - told["hashed"]
    console.print(copies + (f"; {unhashed:,} have no hash, `headwater index` takes it" if unhashed else ""))
    if (shuffle := told["shuffle"]) is not None:
        console.print(
            f"shuffling with the default window moves a sample by {shuffle['displacement']:.2f} of the epoch (a full shuffle: "
            f"0.33); a batch of {BATCH} meets {shuffle['shards']:.0%} of the shards that it would meet in a full shuffle"
        )
    for one in told["headers"]:
        if one["header"]:
            console.print(f"header of {one['shards']:,} shards: {'; '.join(short(*fact) for fact in one['header'].items())}")


def short(name: str, fact: Any) -> str:
    """One fact of a header in a few words: slots by their kinds, long texts and tables by their size."""
    if isinstance(fact, dict) and isinstance(fact.get("slots"), list):
        kinds = Counter(slot.get("kind", "unknown") if isinstance(slot, dict) else "unknown" for slot in fact["slots"])
        return f"{name} {len(fact['slots'])} slots ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
    text = dumps(fact, ensure_ascii=False)
    return f"{name} {text if len(text) <= 60 else f'({len(text):,} characters)'}"
