"""Cut shards anew: `headwater reshard out/ new/ --samples 1000 --split train=0.9,validation=0.1`."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import partial
from itertools import accumulate

from rich.console import Console

from headwater.datamodules.files import expand
from headwater.tools.copying import Copied, Sort, copy, local, report, staged
from headwater.tools.ingest.splits import place
from headwater.tools.parts import Part, refuse_mixed_slots, set_name, survey, with_prefixes


def reshard(
    shards: str,
    out: str,
    samples: int = 10_000,
    size: int = 1 << 30,
    key: str = "",
    split: str = "",
    sort: Sort = "none",
    overwrite: bool = False,
) -> None:
    """Cut shards anew by number, size, key or split, at constant memory.

    Members are copied byte by byte, with their hints; a shard keeps the header of its samples. Sets that differ in name, such
    as train-*.tar and validation-*.tar, stay apart unless --split deals them out anew. Where shards share keys, the name of
    its shard is put before every key.

    Args:
        shards: a tar, a folder, a glob, a brace range or a URL.
        out: folder for the new shards; it appears, or they appear in it, when all are written.
        samples: samples per shard.
        size: bytes per shard; it is closed by the sample that reaches them.
        key: a regular expression; only samples in whose key it is found are taken.
        split: shares by a hash of the key, "train=0.9,validation=0.1"; a sample keeps its side when others are added.
        sort: key = in the order of the keys; none = as they come.
        overwrite: replace the shards that `out` holds.
    """
    shares, wanted = _shares(split), _pattern(key)
    paths, target = expand(shards), local(out)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    copied = Copied(Counter(), Counter(), Counter(), [])
    with staged(target, paths, overwrite) as folder:
        sets: dict[str, list[Part]] = {}
        for path in paths:
            sets.setdefault("" if shares else set_name(path, target.name), []).append(survey(path, wanted=wanted))
        for name, parts in sets.items():
            refuse_mixed_slots(parts)
            if sort == "key" and any(part.header != parts[0].header for part in parts):
                raise ValueError(f"shards of {shards} have headers that differ, and a shard holds only one; leave --sort out")
            parts = with_prefixes(parts)
            if parts[0].prefix:
                console.print(f"keys repeat: each gets the name of its shard, such as {parts[0].prefix}KEY")
            copy(parts, folder, partial(_target, shares, name), samples, size, sort, copied)
        if not copied.samples:
            raise ValueError(f"found no sample in {len(paths)} shards whose key holds {key!r}; nothing was written")
        report(copied, folder, target, console)


def _pattern(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise ValueError(f"found --key {key}; expected a regular expression: {error}") from error


def _shares(split: str) -> dict[str, float]:
    """ "train=0.9,validation=0.1" -> {"train": 0.9, "validation": 1.0}: where the side of each name ends."""
    if not split:
        return {}
    pairs = [part.partition("=") for part in split.split(",")]
    try:
        shares = {name.strip(): float(share) for name, _, share in pairs}
    except ValueError:
        shares = {}
    good = len(shares) == len(pairs) and all(re.fullmatch(r"[\w-]+", name) and share > 0 for name, share in shares.items())
    if not good or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"found --split {split}; expected names with shares that add up to 1, such as train=0.9,validation=0.1")
    return dict(zip(shares, [*list(accumulate(shares.values()))[:-1], 1.0]))


def _target(ends: dict[str, float], name: str, part: Part, key: str) -> str:
    """The new set of a sample: the side on which the hash of its key falls, or its old one."""
    return next((side for side, end in ends.items() if place(key) < end), name)
